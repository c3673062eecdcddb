"""The reader: integrity, refusals that name the file, blobs, closing, the cost of importing it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

import rkf
from rkf.errors import IntegrityError, RkfError, StructureError, UsageError
from rkf.file.archive import pack
from rkf.file.container import Container
from rkf.file.writer import Writer
from rkf.format.constants import ALIGNMENT, KIND_MODEL
from rkf.format.matrix import ClusteredMatrix, DenseTensor
from tests.format import build


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return build.write_model(tmp_path / "model.rkf")


def test_what_a_container_says(path: Path) -> None:
    with rkf.open(path) as container:
        assert (container.path, container.kind, container.file_bytes) == (path, KIND_MODEL, path.stat().st_size)
        assert container.order == "ascending"
        assert len(container.ranks_id) == len(container.dense_id) == 32
        entry = container.tensors["model.layers.0.mlp.up_proj.weight"]
        assert (entry.kind, entry.shape, entry.source_dtype) == ("clustered", (24, 16), "bf16")
        assert container.tensors["model.norm.weight"].k is None
        assert container.blob("chat_template.jinja") == b"{{ messages }}"
        assert container.blob("x-none") is None


def test_sections_are_aligned_and_cover_the_file(path: Path) -> None:
    with rkf.open(path) as container:
        end = 128
        for section in container.sections:
            assert section.offset == -(-end // ALIGNMENT) * ALIGNMENT
            end = section.offset + section.length


def test_unknown_names_are_refused(path: Path) -> None:
    with rkf.open(path) as container:
        for use in (container.load, container.decode, container.values, container.counts):
            with pytest.raises(UsageError, match=r"model\.rkf: no tensor 'w'"):
                use("w")
        with pytest.raises(UsageError, match="dense"):
            container.values("model.norm.weight")
        with pytest.raises(UsageError, match="dense"):
            container.counts("model.norm.weight")


def test_counts_are_the_histogram(path: Path) -> None:
    with rkf.open(path) as container:
        matrix = container.load("model.embed_tokens.weight")
        assert isinstance(matrix, ClusteredMatrix)
        np.testing.assert_array_equal(container.counts("lm_head.weight"), matrix.counts)
        tables = np.arange(matrix.rows) // matrix.rows_per_table
        for table in range(len(matrix.counts)):
            histogram = np.bincount(matrix.indices()[tables == table].ravel(), minlength=matrix.k)
            np.testing.assert_array_equal(matrix.counts[table], histogram)


def test_views_outlive_the_container_and_nothing_new_is_loaded(path: Path) -> None:
    container = rkf.open(path)
    matrix = container.load("model.embed_tokens.weight")
    expected = matrix.decode()
    container.close()
    container.close()
    np.testing.assert_array_equal(matrix.decode(), expected)
    for use in (container.load, container.values):
        with pytest.raises(UsageError, match=r"model\.rkf: the container is closed"):
            use("model.embed_tokens.weight")
    with pytest.raises(UsageError, match="closed"):
        container.blob("tokenizer.json")


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing", "x" * 3000, "nul\0byte"):
        with pytest.raises(UsageError):
            rkf.open(tmp_path / name)
    for device in ("/dev/null", "/dev/zero"):
        with pytest.raises(UsageError, match="regular file"):
            rkf.open(device)


def test_an_unknown_level_is_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="structure"):
        rkf.open(path, check="semantics")


@pytest.mark.parametrize(("change", "what"), [(-1, "truncated"), (1, "after the end")])
def test_another_length_is_refused(path: Path, change: int, what: str) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0")
    with pytest.raises(StructureError, match=rf"model\.rkf: .*{what}"):
        rkf.open(path)


def damaged(path: Path, offset: int, mask: int = 1) -> Path:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)
    return path


def test_damage_in_each_section_is_named(path: Path) -> None:
    with rkf.open(path) as container:
        sections = container.sections
    for number, section in enumerate(sections):
        damaged(path, section.offset + section.length - 1)
        with pytest.raises(IntegrityError, match=rf"model\.rkf: section {number} \({section.name or section.kind}\)"):
            rkf.open(path)
        rkf.open(path, check="structure").close()
        damaged(path, section.offset + section.length - 1)
    rkf.open(path).close()


def test_padding_is_zero(path: Path) -> None:
    with rkf.open(path) as container:
        ends = [section.offset + section.length for section in container.sections]
    for end in ends:
        if end % ALIGNMENT:
            for offset in (end, -(-end // ALIGNMENT) * ALIGNMENT - 1):
                with pytest.raises(IntegrityError, match="padding"):
                    rkf.open(damaged(path, offset))
                damaged(path, offset)


def rewrite_section(path: Path, kind: str, change: Any) -> None:
    """Change the bytes of the first section of a kind and recompute the hashes."""
    data = path.read_bytes()
    sections = build.directory_of(data)["sections"]
    number, section = next((n, section) for n, section in enumerate(sections) if section["kind"] == kind)
    stored = bytearray(data[section["offset"] : section["offset"] + section["length"]])
    change(stored)
    path.write_bytes(build.with_section(data, number, bytes(stored)))


def one_matrix(path: Path, **options: Any) -> Path:
    rng = np.random.default_rng(0)
    affine = build.affine(rng, 8, 40, "row", a="f16", b="f16")
    matrix = build.clustered(rng, (8, 40), 16, affine=affine, exceptions=3, dtype="f16")
    with Writer(path, metadata={}, provenance={}) as writer:
        writer.add("w", matrix)
    return path


def put(dtype: str, offset: int, *values: float) -> Any:
    def change(stored: bytearray) -> None:
        array = np.array(values, dtype)
        stored[offset : offset + array.nbytes] = array.tobytes()

    return change


@pytest.mark.parametrize(
    ("kind", "change", "what"),
    [
        ("values", put("<f4", 0, np.nan), "centroids: expected finite"),
        ("values", put("<f4", 60, np.inf), "centroids: expected finite"),
        ("values", put("<f4", 4, -100), "centroids of table 0: expected strictly ascending"),
        ("values", put("<f4", 0, 1, 1), "centroids of table 0: expected strictly ascending"),
        ("values", put("<f2", 64, 0), "affine a: expected finite values above 0"),
        ("values", put("<f2", 64, -1), "affine a: expected finite values above 0"),
        ("values", put("<f2", 78, np.nan), "affine a: expected finite values above 0"),
        ("values", put("<f2", 128, np.inf), "affine b: expected finite"),
        ("values", put("<f2", 192, np.nan), "exception values: expected finite"),
        ("values", put("u1", 80, 1), "values section, padding from byte 80 to 128"),
        ("positions", put("<u4", 0, 1, 1), "positions: expected ascending"),
        ("positions", put("<u4", 0, 9, 5), "positions: expected ascending"),
        ("positions", put("<u4", 8, 320), "positions: expected values below 320, got 320"),
        ("positions", put("<u4", 8, 2**32 - 1), "positions: expected values below 320"),
    ],
)
def test_small_arrays_are_checked(tmp_path: Path, kind: str, change: Any, what: str) -> None:
    path = one_matrix(tmp_path / "m.rkf")
    rewrite_section(path, kind, change)
    with pytest.raises(IntegrityError, match=what):
        rkf.open(path)
    with rkf.open(path, check="structure") as container:
        if "padding" in what:
            container.load("w")
            return
        with pytest.raises(IntegrityError, match=what):
            container.load("w")


def packed_model(tmp_path: Path) -> Path:
    """A packed file with one matrix whose planes compress well."""
    rng = np.random.default_rng(0)
    matrix = build.clustered(rng, (64, 256), 16)
    matrix.planes[0][:, 64:] = 0
    with Writer(tmp_path / "raw.rkf", metadata={}, provenance={}) as writer:
        writer.add("w", matrix)
    pack(tmp_path / "raw.rkf", tmp_path / "packed.rkf")
    return tmp_path / "packed.rkf"


def test_a_packed_section_that_decodes_to_something_else_is_refused(tmp_path: Path) -> None:
    path = packed_model(tmp_path)
    data = path.read_bytes()

    def change(directory: dict[str, Any]) -> dict[str, Any]:
        directory["sections"][0]["hash"] = bytes(32)
        return build.with_identities(directory)

    path.write_bytes(build.resealed(data, change))
    expected = r"packed\.rkf: section 0 \(plane\): expected hash 0000"
    with rkf.open(path) as container, pytest.raises(IntegrityError, match=expected):
        container.load("w")
    with rkf.open(path, check="structure") as container:
        container.load("w")


def test_broken_frames_are_refused(tmp_path: Path) -> None:
    path = packed_model(tmp_path)
    data = path.read_bytes()
    section = build.directory_of(data)["sections"][0]
    start, length, decoded = section["offset"], section["length"], section["decoded_length"]
    plane = zstandard.ZstdDecompressor().decompress(data[start : start + length])
    compress = zstandard.ZstdCompressor(level=19).compress
    unsized = zstandard.ZstdCompressor(level=19, write_content_size=False).compress(plane)
    frames = {
        "is skippable": b"\x50\x2a\x4d\x18" + decoded.to_bytes(4, "little") + plane,
        "ends early": data[start : start + length - 1] + b"",
        "is damaged": data[start : start + 40] + bytes(length - 40),
        "has a leftover": compress(plane) + b"\0",
        "two frames": compress(plane[:4000]) + compress(plane[4000:]),
        "of another size": compress(plane + b"\0"),
        "states no size": unsized,
        "declares 1 TiB": b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + bytes(40),
        "needs a window of 2^31": b"\x28\xb5\x2f\xfd\x80\xa8" + decoded.to_bytes(4, "little") + bytes(40),
    }
    for frame in frames.values():
        path.write_bytes(build.with_section(data, 0, frame))
        with (
            rkf.open(path) as container,
            pytest.raises(IntegrityError, match=r"section 0 \(plane\), chunk 0: expected"),
        ):
            container.load("w")


def test_loading_many(path: Path) -> None:
    pack(path, path.with_name("packed.rkf"))
    for file in (path, path.with_name("packed.rkf")):
        with rkf.open(file) as container:
            loaded = list(container.load_many(container.tensors))
            assert [name for name, _ in loaded] == list(container.tensors)
            for name, tensor in loaded:
                np.testing.assert_array_equal(tensor.decode(), container.decode(name))
            with pytest.raises(UsageError, match="no tensor 'w'"):
                list(container.load_many(["model.norm.weight", "w"]))


def test_loading_from_several_threads(path: Path) -> None:
    with rkf.open(path) as container, ThreadPoolExecutor(8) as pool:
        names = [name for name in container.tensors for _ in range(20)]
        expected = {name: container.decode(name) for name in container.tensors}
        for name, weights in zip(names, pool.map(container.decode, names), strict=True):
            np.testing.assert_array_equal(weights, expected[name])


def test_opening_imports_neither_numba_nor_torch(path: Path) -> None:
    code = f"""
import sys, rkf
with rkf.open({str(path)!r}) as container:
    container.decode("lm_head.weight")
print([name for name in ("numba", "torch", "safetensors", "tokenizers", "jinja2") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "[]"


def test_an_empty_model_is_a_file(tmp_path: Path) -> None:
    with Writer(tmp_path / "m.rkf", metadata={}, provenance={}):
        pass
    with rkf.open(tmp_path / "m.rkf") as container:
        assert dict(container.tensors) == {}
        assert container.sections == ()


def test_containers_are_what_open_gives(path: Path) -> None:
    container = rkf.open(os.fspath(path))
    assert isinstance(container, Container)
    assert isinstance(container.load("model.norm.weight"), DenseTensor)
    assert issubclass(IntegrityError, RkfError)
    container.close()
