"""Every number of the container: magic, versions, layout, codes, limits. Knows no I/O and no tensor's meaning.

The tables of spec/rkf-1.md are tested to equal these constants.
"""

from __future__ import annotations

import struct

MAGIC = b"\x89RKF\r\n\x1a\n"
MAJOR, MINOR = 1, 0

# Kinds of file, in the superblock.
KIND_MODEL, KIND_VALUES, KIND_PART = 1, 2, 3

# Superblock: magic, major, minor, kind, required mask, optional mask, directory offset, directory length, file length,
# BLAKE3-256 of the directory, 8 reserved zero bytes, BLAKE3-256 of the 96 bytes before it.
SUPERBLOCK = struct.Struct("<8sHHIQQQQQ32s8s32s")
SUPERBLOCK_BYTES = 128
SUPERBLOCK_HASHED_BYTES = 96

ALIGNMENT = 64
HASH_BYTES = 32

# Required-feature bits. A reader that does not know a set bit refuses the file and names the bit.
FEATURE_PARTS = 1 << 0  # the model lies in several files (spec/parts.md)
FEATURE_DENSE_OVERRIDES = 1 << 1  # a values file also replaces dense tensors (reserved in 1.0)
FEATURE_PROGRAM = 1 << 2  # metadata.model carries a program (spec/program.md)
KNOWN_REQUIRED = FEATURE_PARTS | FEATURE_PROGRAM

# Blobs; other names begin with "x-".
TOKENIZER, CHAT_TEMPLATE = "tokenizer.json", "chat_template.jinja"
# In files with FEATURE_PROGRAM also the checkpoint's own files, verbatim: exporters give them back.
VERBATIM = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json")

# Section codecs.
CODEC_RAW, CODEC_ZSTD = "raw", "zstd"
ZSTD_CHUNK_BYTES = 16 << 20
ZSTD_WINDOW_LOG_MAX = 27
# Bounds the memory and time that a small hostile file can cost; a section that shrinks further is stored raw.
MAX_ZSTD_EXPANSION = 256

# Dense dtypes: name -> bytes per value. numpy holds bf16 as uint16.
DTYPE_BYTES = {"bf16": 2, "f16": 2, "f32": 4}

# Limits.
MAX_DIRECTORY_BYTES = 64 << 20
MAX_PARTS = 99_999  # their numbers have five digits in names of files
MAX_DEPTH = 8
MAX_CONTAINERS = 1 << 19  # maps and lists of a directory: 40,000 clustered tensors
# All other values in a directory, without keys. Tensors and sections have about 6 per map. Without a limit, 60 MB of
# one-byte integers cost a plain decoder 7 GB.
MAX_VALUES = 1 << 22
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 255
MAX_WEIGHTS = 1 << 48
MIN_K, MAX_K = 2, 256
GROUP_SIZES = (32, 64, 128, 256)
MAX_BLOB_BYTES = 64 << 20  # tokenizer.json, chat template
# Exceptions are rare by definition: at most one weight in eight, so that they cost less than the ranks.
MAX_EXCEPTION_SHARE = 8


def index_bits(k: int) -> int:
    """Bits of an index into k centroids: ceil(log2 k)."""
    return (k - 1).bit_length()


def plane_bits(bits: int) -> tuple[int, ...]:
    """The rank planes of an index, most significant first: as many of 4, then 2, then 1 bits as fit (5 -> (4, 1))."""
    planes = []
    for width in (4, 4, 2, 1):
        if bits >= width:
            planes.append(width)
            bits -= width
    return tuple(planes)


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one row of a plane: every row is padded to a whole byte."""
    return (columns * bits + 7) // 8


def aligned(offset: int) -> int:
    """The first multiple of ALIGNMENT at or after offset."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def position_bytes(weights: int) -> int:
    """Bytes of one exception position in a tensor with this many weights: 4, or 8 beyond 2^32."""
    return 4 if weights <= 1 << 32 else 8
