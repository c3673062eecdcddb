"""The container's specification says what rkf/format/constants.py and rkf/model/first_form.py say; its example is the
vector. The program's is tests/spec/test_program_document.py's.
"""

from __future__ import annotations

import re
import struct
from dataclasses import fields

from rkf.format import constants as rkf_format
from rkf.format.extents import SECTION_KINDS
from rkf.model.first_form import ARCHITECTURES, ModelConfig, RopeScaling
from tests.format.first_form_metadata import shapes_of
from tests.spec.document import SPEC, VECTORS, code, hexdump, table

SPEC_TYPES = {"u16": "H", "u32": "I", "u64": "Q", "u8[8]": "8s", "u8[32]": "32s"}


def test_superblock() -> None:
    rows = table("rkf-1.md", "offset", "bytes", "type", "field", "rule")
    layout, offset = "<", 0
    for row_offset, size, kind, _, _ in rows:
        assert int(row_offset) == offset
        letter = SPEC_TYPES[code(kind)[0]]
        assert struct.calcsize("<" + letter) == int(size)
        layout, offset = layout + letter, offset + int(size)
    assert layout == rkf_format.SUPERBLOCK.format
    assert offset == rkf_format.SUPERBLOCK_BYTES == rkf_format.SUPERBLOCK.size
    rules = {row[3]: row[4] for row in rows}
    assert bytes.fromhex(code(rules["magic"])[0]) == rkf_format.MAGIC
    assert (int(rules["major"]), int(rules["minor"].split()[0])) == (rkf_format.MAJOR, rkf_format.MINOR)
    kinds = (rkf_format.KIND_MODEL, rkf_format.KIND_VALUES, rkf_format.KIND_PART)
    assert rules["kind"] == "{} model, {} values, {} part".format(*kinds)
    assert rules["directory_length"] == f"1 to {rkf_format.MAX_DIRECTORY_BYTES}"
    assert int({row[3]: row[0] for row in rows}["superblock_hash"]) == rkf_format.SUPERBLOCK_HASHED_BYTES


def test_limits() -> None:
    limits = {row[0]: int(row[1]) for row in table("rkf-1.md", "limit", "value")}
    assert limits == {
        "bytes of the directory": rkf_format.MAX_DIRECTORY_BYTES,
        "depth of the directory": rkf_format.MAX_DEPTH,
        "maps and arrays of the directory": rkf_format.MAX_CONTAINERS,
        "other values of the directory": rkf_format.MAX_VALUES,
        "bytes of a name": rkf_format.MAX_NAME_BYTES,
        "dimensions": rkf_format.MAX_DIMENSIONS,
        "weights of a tensor": rkf_format.MAX_WEIGHTS,
        "least K": rkf_format.MIN_K,
        "greatest K": rkf_format.MAX_K,
        "weights per exception, at least": rkf_format.MAX_EXCEPTION_SHARE,
        "decoded bytes of a blob": rkf_format.MAX_BLOB_BYTES,
        "decoded bytes of a zstd chunk": rkf_format.ZSTD_CHUNK_BYTES,
        "log2 of the zstd window": rkf_format.ZSTD_WINDOW_LOG_MAX,
        "decoded bytes per stored byte of a zstd section": rkf_format.MAX_ZSTD_EXPANSION,
    }


def test_features() -> None:
    bits = {int(row[0]): row[1] for row in table("rkf-1.md", "required bit", "meaning")}
    assert {1 << bit for bit in bits} == {
        rkf_format.FEATURE_PARTS,
        rkf_format.FEATURE_DENSE_OVERRIDES,
        rkf_format.FEATURE_PROGRAM,
    }
    assert rkf_format.KNOWN_REQUIRED == rkf_format.FEATURE_PARTS | rkf_format.FEATURE_PROGRAM


def test_planes() -> None:
    text = " ".join((SPEC / "rkf-1.md").read_text().split())
    planes = dict(re.findall(r"(\d) → \[([\d,]+)\]", text))
    assert {int(bits): tuple(map(int, widths.split(","))) for bits, widths in planes.items()} == {
        bits: rkf_format.plane_bits(bits) for bits in range(1, 9)
    }


def test_words() -> None:
    """Dtypes, group sizes, codecs and kinds of sections are those of the code."""
    words = {code(row[0])[0]: row[2] for row in table("rkf-1.md", "key", "type", "rule", holding="codec")}
    assert re.findall(r'"(\w+)"', words["codec"]) == [rkf_format.CODEC_RAW, rkf_format.CODEC_ZSTD]
    assert set(re.findall(r'"(\w+)"', words["kind"])) == set(SECTION_KINDS)
    kinds = {code(row[0])[0] for row in table("rkf-1.md", "kind", "decoded bytes", "contents")}
    assert kinds == set(SECTION_KINDS)
    affine = {code(row[0])[0]: row[2] for row in table("rkf-1.md", "key", "type", "rule", holding="granularity")}
    assert tuple(map(int, re.findall(r"\d+", affine["group"]))) == rkf_format.GROUP_SIZES
    text = " ".join((SPEC / "rkf-1.md").read_text().split())
    dtypes = re.search(r"`dtype` \(([^)]*)\)", text)
    assert dtypes is not None
    assert re.findall(r'"(\w+)"', dtypes[1]) == list(rkf_format.DTYPE_BYTES)


def test_hexdump() -> None:
    assert hexdump("rkf-1.md") == (VECTORS / "smallest.rkf").read_bytes()


def test_length() -> None:
    assert len((SPEC / "rkf-1.md").read_text().splitlines()) <= 300
    assert len((SPEC / "reference_reader.py").read_text().splitlines()) <= 150


def test_model_keys() -> None:
    """spec/metadata.md lists the keys of ModelConfig, those that may be absent with a `?`."""
    listed = {code(row[0])[0] for row in table("metadata.md", "key", "type", "rule")}
    config = fields(ModelConfig)
    assert {key.rstrip("?") for key in listed} == {item.name for item in config}
    assert {key[:-1] for key in listed if key.endswith("?")} == {item.name for item in config if item.default is None}
    rules = {code(row[0])[0]: row[2] for row in table("metadata.md", "key", "type", "rule")}
    assert tuple(re.findall(r'"(\w+)"', rules["architecture"])) == ARCHITECTURES


def test_rope_scalings() -> None:
    listed = {code(row[0])[0]: row[1] for row in table("metadata.md", "type", "keys (all required)", "f becomes")}
    for kind, keys in (('"linear"', {"factor"}), ('"llama3"', {item.name for item in fields(RopeScaling)} - {"type"})):
        assert set(code(listed.pop(kind))) == keys
    assert not listed


def test_tensor_names() -> None:
    """The names, shapes and obligations of spec/metadata.md are those of the programs that 1.0 files become."""
    config = ModelConfig("llama", 11, 12, 13, 1, 6, 3, 4, 99, 1e-5, 1e4)
    sizes = {"vocab_size": 11, "H": 12, "I": 13, "Q": 6 * 4, "V": 3 * 4, "head_dim": 4}
    listed = {}
    for name, shape, required in table("metadata.md", "name", "shape", "required"):
        for short in code(name):
            full = short.replace("L.", "model.layers.0.", 1) if short.startswith("L.") else short
            if "rows of the weight" not in shape:
                dimensions = tuple(sizes[word.strip()] for word in shape.strip("[]").split(","))
                listed[full] = (dimensions, required.startswith("yes"))
    weights = {name: shape for name, (shape, _) in listed.items() if "proj" in name}
    biases = {name.replace(".weight", ".bias"): (shape[:1], False) for name, shape in weights.items()}
    required = {name: shape for name, (shape, needed) in listed.items() if needed}
    assert shapes_of(config, optional=False) == required
    assert shapes_of(config, optional=True) == {name: shape for name, (shape, _) in (listed | biases).items()}
