"""The first 128 bytes identify an rkf file, mark it complete and locate its directory. Knows no directory."""

from __future__ import annotations

from dataclasses import dataclass

from blake3 import blake3

from rkf.errors import NotRkfError, UnsupportedError
from rkf.format.constants import (
    ALIGNMENT,
    FEATURE_PARTS,
    KIND_MODEL,
    KIND_PART,
    KIND_VALUES,
    KNOWN_REQUIRED,
    MAGIC,
    MAJOR,
    MAX_DIRECTORY_BYTES,
    MINOR,
    SUPERBLOCK,
    SUPERBLOCK_BYTES,
    SUPERBLOCK_HASHED_BYTES,
)
from rkf.format.fields import refuse

_RESERVED = bytes(8)
# Other files that users pass by mistake, by their first bytes.
_FOREIGN = (
    (b"GGUF", "a GGUF file: convert it with `rkf convert`"),
    (b"PK\x03\x04", "a zip archive (a pickled checkpoint?): rkf reads safetensors and GGUF checkpoints only"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
    (b"<", "an HTML or XML page: the download failed, fetch the file again"),
    (b"\x28\xb5\x2f\xfd", "a zstd stream: decompress it first"),
    (b"\x1f\x8b", "a gzip stream: decompress it first"),
    (b"{", "a JSON file"),
)
# The magic after line-end translation: to Unix, to DOS, to DOS where it already is DOS.
_TEXT_MODE = tuple(
    MAGIC.replace(old, new) for old, new in ((b"\r\n", b"\n"), (b"\x1a\n", b"\x1a\r\n"), (b"\n", b"\r\n"))
)


@dataclass(frozen=True, slots=True)
class Superblock:
    """The fields in file order, without the magic and its own hash."""

    kind: int
    directory_offset: int
    directory_length: int
    file_bytes: int
    directory_hash: bytes
    minor: int = MINOR
    required: int = 0
    optional: int = 0

    def encode(self) -> bytes:
        """The 128 bytes."""
        head = SUPERBLOCK.pack(
            MAGIC, MAJOR, self.minor, self.kind, self.required, self.optional, self.directory_offset,
            self.directory_length, self.file_bytes, self.directory_hash, _RESERVED, bytes(32),
        )[:SUPERBLOCK_HASHED_BYTES]  # fmt: skip
        return head + blake3(head).digest()

    @property
    def in_parts(self) -> bool:
        """Whether the file is the index of a model in several files, or one of these."""
        return bool(self.required & FEATURE_PARTS)


def parse_superblock(data: bytes) -> Superblock:
    """The superblock at the start of `data`, which may be shorter or longer.

    Raises NotRkfError for another kind of file, UnsupportedError for a newer one, StructureError for a damaged one. The
    hash is checked before the fields (its place is the same in every version), so damage is never reported as a missing
    feature.
    """
    _check_magic(data)
    if len(data) < SUPERBLOCK_BYTES:
        refuse("superblock", f"{SUPERBLOCK_BYTES} bytes", f"{len(data)} (truncated)")
    fields = SUPERBLOCK.unpack_from(data)
    _, major, minor, kind, required, optional, offset, length, file_bytes, directory_hash, reserved, own_hash = fields
    if blake3(data[:SUPERBLOCK_HASHED_BYTES]).digest() != own_hash:
        refuse("superblock", "the hash of its fields", "another one")
    if major != MAJOR:
        raise UnsupportedError(f"superblock: expected version {MAJOR}.x, got {major}.{minor}; update rkf")
    if required & ~KNOWN_REQUIRED:
        bits = [bit for bit in range(64) if (required & ~KNOWN_REQUIRED) >> bit & 1]
        raise UnsupportedError(
            f"superblock: the file requires features (bits {bits}) that rkf {MAJOR}.{MINOR} lacks; update rkf"
        )
    if kind == KIND_PART and not required & FEATURE_PARTS:
        raise UnsupportedError("superblock: a part of an unknown form; update rkf")
    if kind not in (KIND_MODEL, KIND_VALUES, KIND_PART):
        refuse("superblock, kind", f"{KIND_MODEL} (model), {KIND_VALUES} (values) or {KIND_PART} (part)", kind)
    if kind == KIND_VALUES and required & FEATURE_PARTS:
        refuse("superblock, kind", "a model or one of its parts", "a values file, which is never in parts")
    if reserved != _RESERVED:
        refuse("superblock, reserved bytes", "zeros", reserved.hex())
    if not 1 <= length <= MAX_DIRECTORY_BYTES:
        refuse("superblock, directory length", f"1 to {MAX_DIRECTORY_BYTES}", length)
    if offset < SUPERBLOCK_BYTES or offset % ALIGNMENT:
        refuse("superblock, directory offset", f"a multiple of {ALIGNMENT} from {SUPERBLOCK_BYTES} on", offset)
    if offset + length != file_bytes:
        refuse("superblock, file length", f"the directory's end at {offset + length}", file_bytes)
    return Superblock(kind, offset, length, file_bytes, directory_hash, minor, required, optional)


def _check_magic(data: bytes) -> None:
    if data.startswith(MAGIC) or (data and MAGIC.startswith(data)):
        return
    if not data:
        raise NotRkfError("the file is empty: fetch or convert it again")
    if not any(data[:SUPERBLOCK_BYTES]):
        raise NotRkfError("the file was never committed (its superblock is still zero): convert it again")
    if data.startswith(_TEXT_MODE):
        raise NotRkfError("expected an rkf file, got one with translated line ends: copy it again in binary mode")
    for prefix, name in _FOREIGN:
        if data.startswith(prefix):
            raise NotRkfError(f"expected an rkf file, got {name}")
    if data[8:9] == b"{" and data[7] == 0:
        raise NotRkfError("expected an rkf file, got a safetensors file: convert it with `rkf convert`")
    raise NotRkfError(f"expected an rkf file (magic {MAGIC.hex(' ')}), got one that begins with {data[:8].hex(' ')}")
