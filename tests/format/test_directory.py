"""Structure: every rule of the directory, each broken alone, with hashes recomputed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rkf
from rkf.errors import RkfError, StructureError, UnsupportedError
from rkf.file.values import write_values
from rkf.file.writer import Writer
from rkf.format import canonical
from rkf.format.constants import MAX_BLOB_BYTES, MAX_WEIGHTS, SUPERBLOCK
from rkf.format.directory import parse_directory
from rkf.format.extents import Claims, Section
from rkf.format.matrix import DenseTensor
from rkf.format.superblock import parse_superblock
from rkf.model.expected import read_model
from tests.format import build
from tests.format.first_form_metadata import metadata_of

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Clustered a (one table, exceptions, group affine), alias b, dense c, clustered d (two planes, tables), a blob."""
    path, rng = tmp_path_factory.mktemp("directory") / "m.rkf", np.random.default_rng(0)
    with Writer(path, metadata={"note": 1}, provenance={}) as writer:
        affine = build.affine(rng, 8, 40, "group 32", a="f16", b="f32")
        writer.add("a", build.clustered(rng, (8, 40), 16, affine=affine, exceptions=3), {"error": 1})
        writer.add("b", rkf.format.matrix.Alias("a"))
        writer.add("c", DenseTensor("f16", np.ones(5, "<f2")))
        writer.add("d", build.clustered(rng, (3, 4, 7), 5, rows_per_table=5))
        writer.blob("tokenizer.json", b"{}")
        writer.blob("x-note", b"hello")
    return path.read_bytes()


@pytest.fixture(scope="module")
def values(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("values")
    (folder / "m.rkf").write_bytes(data)
    with rkf.open(folder / "m.rkf") as model:
        write_values(folder / "v.rkv", model, {})
    return (folder / "v.rkv").read_bytes()


def parse(data: bytes) -> None:
    superblock = parse_superblock(data)
    read_model(parse_directory(data[superblock.directory_offset :], superblock), superblock)


def put(*path: Any) -> Change:
    """A change: put the last item of `path` at the place that the others name; Ellipsis removes it."""

    def change(directory: dict[str, Any]) -> None:
        *keys, last, value = path
        node: Any = directory
        for key in keys:
            node = node[key]
        if value is ...:
            del node[last]
        else:
            node[last] = value

    return change


def append(*path: Any) -> Change:
    def change(directory: dict[str, Any]) -> None:
        *keys, value = path
        node: Any = directory
        for key in keys:
            node = node[key]
        node.append(value)

    return change


def swap(key: str, i: int, j: int) -> Change:
    def change(directory: dict[str, Any]) -> None:
        items = directory[key]
        items[i], items[j] = items[j], items[i]

    return change


def test_the_file_itself_parses(data: bytes, values: bytes) -> None:
    parse(data)
    parse(values)
    parse(build.resealed(data, put("x-more", [1, {"a": 2}])))
    parse(build.resealed(data, put("tensors", 0, "values", "affine", "x-fit", "closed form")))


HUGE = (1 << 64) - 1
CASES: list[tuple[str, Change, str]] = [
    ("top is a list", lambda d: [d], "a map"),
    ("top is a string", lambda d: "rkf", "a map"),
    ("not msgpack", lambda d: b"\xc1", "canonical"),
    ("not canonical", lambda d: canonical.encode(d) + b"\0", "canonical"),
    ("missing key", put("metadata", ...), "'metadata'"),
    ("unknown key", put("extra", 1), "'extra'"),
    ("order in a model", put("order", "ascending"), "'order'"),
    ("metadata is a list", put("metadata", []), "metadata"),
    ("short id", put("ranks_id", b"1"), "a hash of 32 bytes"),
    ("id of text", put("dense_id", "1" * 32), "a hash of 32 bytes"),
    ("short hash", put("sections", 0, "hash", bytes(31)), "a hash of 32 bytes"),
    ("other ranks id", put("ranks_id", bytes(32)), "ranks_id"),
    ("other dense id", put("dense_id", bytes(32)), "dense_id"),
    ("sections is a map", put("sections", {}), "sections"),
    ("section is a list", put("sections", 0, []), "section 0"),
    ("negative offset", put("sections", 0, "offset", -128), "offset"),
    ("floating offset", put("sections", 0, "offset", 128.0), "offset"),
    ("boolean length", put("sections", 0, "length", True), "length"),
    ("overlap with the superblock", put("sections", 0, "offset", 64), "overlaps"),
    ("overlap", put("sections", 1, "offset", 128), "overlaps"),
    ("hole", put("sections", 0, "offset", 192), "hole"),
    ("misaligned", put("sections", 1, "offset", 289), "misaligned"),
    ("empty section", put("sections", 0, "length", 0), "length"),
    ("past the end", put("sections", 0, "length", HUGE), "length"),
    ("a byte long", put("sections", 0, "length", 161), "161"),
    ("section removed", put("sections", -1, ...), "directory, offset"),
    ("unknown kind of section", put("sections", 0, "kind", "bias"), "kind"),
    ("kind is a list", put("sections", 0, "kind", []), "kind"),
    ("unknown codec", put("sections", 0, "codec", "lz4"), "codec"),
    ("raw with a decoded length", put("sections", 0, "decoded_length", 160), "decoded_length"),
    ("zstd without chunks", put("sections", 0, "codec", "zstd"), "chunks"),
    ("blob without a name", put("sections", -1, "name", ...), "name"),
    ("plane with a name", put("sections", 0, "name", "x"), "name"),
    ("unknown blob", put("sections", -1, "name", "weights.py"), "x-"),
    ("blobs out of order", put("sections", -2, "name", "x-z"), "in name order"),
    ("blob name with an escape", put("sections", -1, "name", "x-\x1b[2J"), "control"),
    ("section kinds swapped", put("sections", 1, "kind", "plane"), "of kind"),
    ("tensors is a number", put("tensors", 3), "tensors"),
    ("tensor is a string", put("tensors", 0, "w"), "tensor 0"),
    ("tensors out of order", swap("tensors", 0, 3), "section"),
    ("tensor twice", put("tensors", 1, "name", "a"), "duplicate"),
    ("tensor unsorted", put("tensors", 1, "name", "Z"), "unsorted"),
    ("empty name", put("tensors", 0, "name", ""), "name"),
    ("long name", put("tensors", 0, "name", "a" * 256), "name"),
    ("long name in UTF-8", put("tensors", 0, "name", "é" * 128), "name"),
    ("NUL in a name", put("tensors", 0, "name", "a\0"), "control"),
    ("C1 control in a name", put("tensors", 0, "name", "a\x9b"), "control"),
    ("name is bytes", put("tensors", 0, "name", b"a"), "name"),
    ("unknown kind of tensor", put("tensors", 0, "kind", "sparse"), "kind"),
    ("values in a model", put("tensors", 0, "kind", "values"), "kind"),
    ("unknown key of a tensor", put("tensors", 0, "bias", 1), "'bias'"),
    ("missing key of a tensor", put("tensors", 0, "planes", ...), "'planes'"),
    ("one dimension", put("tensors", 0, "shape", [320]), "dimensions"),
    ("no dimension", put("tensors", 2, "shape", []), "dimensions"),
    ("five dimensions", put("tensors", 0, "shape", [1, 1, 1, 8, 40]), "at most 4"),
    ("zero dimension", put("tensors", 0, "shape", [0, 40]), "shape"),
    ("negative dimension", put("tensors", 0, "shape", [-8, 40]), "shape"),
    ("product over 2^48", put("tensors", 0, "shape", [1 << 25, 1 << 24]), str(MAX_WEIGHTS)),
    ("product over 2^64", put("tensors", 0, "shape", [HUGE, HUGE]), str(MAX_WEIGHTS)),
    ("product 0 modulo 2^64", put("tensors", 0, "shape", [1 << 32, 1 << 32]), str(MAX_WEIGHTS)),
    ("another shape", put("tensors", 0, "shape", [8, 42]), "bytes in section"),
    ("a dense shape that is larger", put("tensors", 2, "shape", [6]), "bytes in section"),
    ("unknown dtype", put("tensors", 2, "dtype", "f64"), "dtype"),
    ("unknown source dtype", put("tensors", 0, "source_dtype", "q4_0"), "source_dtype"),
    ("K of 0", put("tensors", 0, "k", 0), "k"),
    ("K of 1", put("tensors", 0, "k", 1), "k"),
    ("K of 257", put("tensors", 0, "k", 257), "k"),
    ("K of another width", put("tensors", 0, "k", 17), "planes"),
    ("K without its counts", put("tensors", 0, "k", 15), "bytes in section"),
    ("no rows a table", put("tensors", 0, "rows_per_table", 0), "rows_per_table"),
    ("more rows a table than rows", put("tensors", 0, "rows_per_table", 9), "rows_per_table"),
    ("more tables", put("tensors", 0, "rows_per_table", 4), "bytes in section"),
    ("too many planes", append("tensors", 0, "planes", 1), "planes"),
    ("planes swapped", put("tensors", 3, "planes", [5, 4]), "used once, in order"),
    ("plane of another tensor", put("tensors", 3, "planes", 0, 0), "used once, in order"),
    ("plane is a string", put("tensors", 0, "planes", 0, "0"), "planes"),
    ("counts beyond the sections", put("tensors", 0, "counts", HUGE), "used once, in order"),
    ("no exceptions", put("tensors", 0, "exceptions", "count", 0), "count"),
    ("too many exceptions", put("tensors", 0, "exceptions", "count", 41), "count"),
    ("more exceptions than positions", put("tensors", 0, "exceptions", "count", 4), "bytes in section"),
    ("exceptions without values", put("tensors", 0, "values", "exceptions", ...), "both"),
    ("values without exceptions", put("tensors", 3, "values", "exceptions", "f16"), "both"),
    ("positions of a wrong section", put("tensors", 0, "exceptions", "positions", 0), "used once, in order"),
    ("unknown granularity", put("tensors", 0, "values", "affine", "granularity", "block"), "granularity"),
    ("group of another size", put("tensors", 0, "values", "affine", "group", 48), "group"),
    ("group is true", put("tensors", 0, "values", "affine", "group", True), "group"),
    ("group without the granularity", put("tensors", 0, "values", "affine", "granularity", "row"), "group"),
    ("granularity without a group", put("tensors", 0, "values", "affine", "group", ...), "group"),
    ("affine of bf16", put("tensors", 0, "values", "affine", "a", "bf16"), "one of f16, f32"),
    ("more values", put("tensors", 3, "values", {"affine": {"granularity": "row", "a": "f32"}}), "bytes in section"),
    ("affine without factors", put("tensors", 0, "values", "affine", {"granularity": "row"}), "a or b"),
    ("affine is null-like", put("tensors", 0, "values", "affine", 0), "a map"),
    ("stats of text", put("tensors", 0, "stats", {"error": "small"}), "number"),
    ("stats of truth", put("tensors", 0, "stats", {"error": True}), "number"),
    ("stats is a list", put("tensors", 0, "stats", []), "a map"),
    ("alias to nothing", put("tensors", 1, "target", "z"), "nothing"),
    ("alias to itself", put("tensors", 1, "target", "b"), "alias"),
    ("alias with a shape", put("tensors", 1, "shape", [1]), "'shape'"),
    ("dense left out", put("tensors", 2, ...), "used once, in order"),
    ("all tensors gone", put("tensors", []), "a tensor that uses it"),
]


@pytest.mark.parametrize(("change", "what"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_each_rule_is_checked(data: bytes, change: Change, what: str) -> None:
    with pytest.raises(StructureError, match=what) as caught:
        parse(build.resealed(data, change))
    assert "\n" not in str(caught.value)


def packed(decoded: Any, *chunks: Any) -> Change:
    """The first plane, 160 bytes, declared as packed in this way."""

    def change(directory: dict[str, Any]) -> None:
        more = {"codec": "zstd", "decoded_length": decoded, "chunks": list(chunks), "stored_hash": bytes(32)}
        directory["sections"][0] |= more

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (packed(161, 160), "bytes in section"),
        (packed(0, 160), "decoded_length"),
        (packed(1 << 40, 160), "decoded_length"),
        (packed(160 * 256 + 1, 160), "decoded_length"),
        (packed(160), "1 for"),
        (packed(160, 80, 80), "1 for"),
        (packed(160, 159), "a sum of"),
        (packed(160, 0), "chunks"),
        (packed(160, "160"), "chunks"),
        (packed(160, -160), "chunks"),
    ],
)
def test_chunks_are_checked(data: bytes, change: Change, what: str) -> None:
    with pytest.raises(StructureError, match=what):
        parse(build.resealed(data, change))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (put("order", ...), "'order'"),
        (put("order", "shuffled"), "order"),
        (put("tensors", 0, "kind", "clustered"), "kind"),
        (put("tensors", 0, "exceptions", {"count": 3, "positions": 0}), "'positions'"),
        (put("tensors", 0, "stats", {}), "'stats'"),
        (put("tensors", 1, "k", 6), "bytes in section"),
    ],
)
def test_values_files_are_checked(values: bytes, change: Change, what: str) -> None:
    with pytest.raises(StructureError, match=what):
        parse(build.resealed(values, change))


def test_a_values_file_has_no_blobs(data: bytes) -> None:
    fields = list(SUPERBLOCK.unpack_from(data))
    fields[3] = 2

    def change(directory: dict[str, Any]) -> None:
        directory["order"] = "ascending"
        directory["tensors"] = []
        directory["sections"] = directory["sections"][-2:]
        directory["sections"][0]["offset"], directory["sections"][1]["offset"] = 128, 192

    short = build.with_superblock(
        data[:256] + canonical.encode(build.directory_of(data)), [*fields[:6], 256, *fields[7:]]
    )
    with pytest.raises(StructureError, match="no blobs"):
        parse(build.resealed(short, change))


def test_sections_may_run_out(tmp_path: Path) -> None:
    with Writer(tmp_path / "m.rkf", metadata={}, provenance={}) as writer:
        writer.add("a", DenseTensor("f32", np.ones(16, "<f4")))
    again = {"kind": "dense", "name": "b", "data": 1, "dtype": "f32", "shape": [16]}
    with pytest.raises(StructureError, match="'b': expected a section 1, got a file with 1 sections"):
        parse(build.resealed((tmp_path / "m.rkf").read_bytes(), append("tensors", again)))


def test_blobs_have_a_cap() -> None:
    size = MAX_BLOB_BYTES + 1
    section = Section("blob", 128, size, bytes(32), "raw", size, bytes(32), name="tokenizer.json")
    with pytest.raises(StructureError, match=r"blob 'tokenizer\.json': expected at most"):
        Claims((section,)).take_blobs(("tokenizer.json",))


def test_a_directory_of_another_length_or_hash_is_refused(data: bytes) -> None:
    superblock = parse_superblock(data)
    directory = data[superblock.directory_offset :]
    with pytest.raises(StructureError, match="bytes"):
        parse_directory(directory + b"\0", superblock)
    with pytest.raises(StructureError, match="hash"):
        parse_directory(directory[:-1] + bytes([directory[-1] ^ 1]), superblock)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build.write_model(tmp_path_factory.mktemp("model") / "model.rkf").read_bytes()


def drop_blob(name: str) -> Change:
    def change(directory: dict[str, Any]) -> None:
        directory["sections"] = [s for s in directory["sections"] if s.get("name") != name]

    return change


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("vocab_size", 41, "model.embed_tokens.weight"),
        ("hidden_size", 8, "shape"),
        ("layers", 2, "model.layers.1.input_layernorm.weight|no such tensor"),
        ("layers", 2**31 - 1, "no such tensor"),
        ("heads", 2, "shape"),
    ],
)
def test_tensors_are_those_of_the_model(model: bytes, key: str, value: int, what: str) -> None:
    with pytest.raises(StructureError, match=what):
        parse(build.resealed(model, put("metadata", "model", key, value)))


def test_a_tensor_that_no_model_has_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(StructureError, match="'zebra': expected only tensors"),
        Writer(tmp_path / "m.rkf", metadata={"model": metadata_of(build.CONFIG)}, provenance={}) as writer,
    ):
        for name, tensor in build.model_tensors():
            writer.add(name, tensor)
        writer.add("zebra", DenseTensor("f32", np.ones(1, "<f4")))
        writer.blob("tokenizer.json", build.TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_a_model_has_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(StructureError, match=r"tokenizer\.json"):
        build.write_model(tmp_path / "m.rkf", blobs={"chat_template.jinja": b"{{ messages }}"})


def test_an_unknown_architecture_is_unsupported(model: bytes) -> None:
    with pytest.raises(UnsupportedError, match="mamba"):
        parse(build.resealed(model, put("metadata", "model", "architecture", "mamba")))


def test_flipped_bits_and_truncations_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.rkf"
    for position in range(0, len(data) * 8, 67):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(RkfError, match=r"m\.rkf"):
            rkf.open(path)
    for length in range(0, len(data), 67):
        path.write_bytes(data[:length])
        with pytest.raises(RkfError, match=r"m\.rkf"):
            rkf.open(path)
