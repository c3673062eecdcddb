"""Packing: lossless to the byte, smaller, refused where it makes no sense."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import rkf
from rkf.errors import ChangedError, IntegrityError, UsageError
from rkf.file.archive import pack, unpack
from rkf.file.atomic import replacing
from rkf.file.sections import SectionWriter
from rkf.file.verify import verify
from rkf.file.writer import Writer
from rkf.format import codec
from rkf.format.constants import KIND_MODEL, MAX_ZSTD_EXPANSION, ZSTD_CHUNK_BYTES
from rkf.format.directory import dense_id, ranks_id
from rkf.format.matrix import ClusteredMatrix
from tests.format import build


def skewed(path: Path, rows: int, columns: int) -> Path:
    """A matrix with ranks distributed as in a real one, so that its planes compress."""
    rng = np.random.default_rng(0)
    indices = np.clip(rng.normal(7.5, 2.5, (rows, columns)), 0, 15).astype(np.uint8)
    counts = np.bincount(indices.ravel(), minlength=16).astype(np.uint64)[None]
    planes = rkf.format.bitpack.pack(indices, 4)
    centroids = np.arange(16, dtype=np.float32)[None]
    with Writer(path, metadata={}, provenance={"by": "test"}) as writer:
        writer.add("w", ClusteredMatrix((rows, columns), planes, counts, centroids, rows, "bf16"))
        writer.blob("chat_template.jinja", b"{}")
        writer.blob("tokenizer.json", b"{" + b" " * 1000 + b"}")
    return path


def test_pack_and_unpack(tmp_path: Path) -> None:
    raw, packed, back = skewed(tmp_path / "m.rkf", 256, 512), tmp_path / "p.rkf", tmp_path / "b.rkf"
    seen: list[tuple[int, int]] = []
    pack(raw, packed, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert packed.stat().st_size < 0.95 * raw.stat().st_size
    with rkf.open(raw) as first, rkf.open(packed) as second:
        assert [section.codec for section in first.sections] == ["raw", "raw", "raw", "raw", "zstd"]
        assert [section.codec for section in second.sections] == ["zstd", "zstd", "zstd", "raw", "zstd"]
        assert first.ranks_id == second.ranks_id
        np.testing.assert_array_equal(first.decode("w"), second.decode("w"))
    verify(packed)
    unpack(packed, back, progress=lambda done, total: None)
    assert back.read_bytes() == raw.read_bytes()


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    raw = skewed(tmp_path / "m.rkf", 256, 512)

    def change(done: int, total: int) -> None:
        with raw.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"x")

    with pytest.raises(ChangedError, match=r"m\.rkf: changed while it was read"):
        pack(raw, tmp_path / "p.rkf", progress=change)
    assert [path.name for path in tmp_path.iterdir()] == ["m.rkf"]


def test_a_blob_that_is_raw_stays_raw(tmp_path: Path) -> None:
    with replacing(tmp_path / "m.rkf") as out:  # as files were written before blobs were compressed
        writer = SectionWriter(out)
        writer.add("blob", [b"{" + b" " * 1000 + b"}"], "tokenizer.json")
        ids = {"ranks_id": ranks_id([], []), "dense_id": dense_id([], [])}
        writer.finish({"metadata": {}, "provenance": {}, "tensors": [], **ids}, KIND_MODEL)
    pack(tmp_path / "m.rkf", tmp_path / "p.rkf")
    unpack(tmp_path / "p.rkf", tmp_path / "b.rkf")
    assert (tmp_path / "b.rkf").read_bytes() == (tmp_path / "m.rkf").read_bytes()


def test_a_plane_of_several_chunks(tmp_path: Path) -> None:
    raw, packed, back = tmp_path / "m.rkf", tmp_path / "p.rkf", tmp_path / "b.rkf"
    rows, columns = 2, ZSTD_CHUNK_BYTES + 100  # two weights a byte: one chunk and 100 bytes
    plane = np.random.default_rng(0).integers(0, 2, (rows, columns // 2), dtype=np.uint8)
    counts = np.zeros((1, 16), np.uint64)
    centroids = np.arange(16, dtype=np.float32)[None]
    with Writer(raw, metadata={}, provenance={}) as writer:
        writer.add("w", ClusteredMatrix((rows, columns), (plane,), counts, centroids, rows, "bf16"))
    pack(raw, packed)
    with rkf.open(packed) as container:
        assert len(container.sections[0].chunks) == 2
        matrix = container.load("w")
        assert isinstance(matrix, ClusteredMatrix)
        np.testing.assert_array_equal(matrix.planes[0], plane)
    unpack(packed, back)
    assert back.read_bytes() == raw.read_bytes()


def test_what_zstd_does_not_shrink_stays_raw(tmp_path: Path) -> None:
    with Writer(tmp_path / "m.rkf", metadata={}, provenance={}) as writer:
        writer.add("w", build.clustered(np.random.default_rng(0), (64, 64), 256))
    pack(tmp_path / "m.rkf", tmp_path / "p.rkf")
    with rkf.open(tmp_path / "p.rkf") as packed:
        assert {section.codec for section in packed.sections if section.kind == "plane"} == {"raw"}


def test_what_shrinks_too_far_stays_raw(tmp_path: Path) -> None:
    plane = np.zeros((1024, 512), np.uint8)
    counts = np.zeros((1, 16), np.uint64)
    counts[0, 0] = 1 << 20
    centroids = np.arange(16, dtype=np.float32)[None]
    with Writer(tmp_path / "m.rkf", metadata={}, provenance={}) as writer:
        writer.add("w", ClusteredMatrix((1024, 1024), (plane,), counts, centroids, 1024, "bf16"))
    assert len(codec.compress_chunk(plane.data)) < plane.size / MAX_ZSTD_EXPANSION
    pack(tmp_path / "m.rkf", tmp_path / "p.rkf")
    rkf.open(tmp_path / "p.rkf").close()


def test_packing_twice_is_refused_and_unpacking_a_raw_file_copies_it(tmp_path: Path) -> None:
    raw, packed = skewed(tmp_path / "m.rkf", 64, 64), tmp_path / "p.rkf"
    pack(raw, packed)
    with pytest.raises(UsageError, match="packed already"):
        pack(packed, tmp_path / "q.rkf")
    with pytest.raises(UsageError, match="--force"):
        pack(raw, packed)
    unpack(raw, tmp_path / "copy.rkf")
    assert (tmp_path / "copy.rkf").read_bytes() == raw.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.rkf", "m.rkf", "p.rkf"]


def test_free_keys_and_versions_survive(tmp_path: Path) -> None:
    raw = skewed(tmp_path / "m.rkf", 64, 64)

    def change(directory: dict[str, object]) -> None:
        directory["x-note"] = [1]
        directory["sections"][0]["x-origin"] = "here"  # type: ignore[index]

    data = build.resealed(raw.read_bytes(), change)
    fields = list(build.SUPERBLOCK.unpack_from(data))
    fields[2], fields[5] = 3, 1 << 9  # minor version, optional features
    raw.write_bytes(build.with_superblock(data, fields))
    pack(raw, tmp_path / "p.rkf")
    unpack(tmp_path / "p.rkf", tmp_path / "b.rkf")
    assert (tmp_path / "b.rkf").read_bytes() == raw.read_bytes()


def test_unpacking_damage_leaves_no_file(tmp_path: Path) -> None:
    pack(skewed(tmp_path / "m.rkf", 64, 64), tmp_path / "p.rkf")
    data = (tmp_path / "p.rkf").read_bytes()

    def change(directory: dict[str, object]) -> dict[str, object]:
        directory["sections"][0]["hash"] = bytes(32)  # type: ignore[index]
        return build.with_identities(directory)

    (tmp_path / "p.rkf").write_bytes(build.resealed(data, change))
    with pytest.raises(IntegrityError, match=r"p\.rkf: section 0"):
        unpack(tmp_path / "p.rkf", tmp_path / "b.rkf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.rkf", "p.rkf"]


def test_results_come_in_order_and_errors_come_out() -> None:
    assert list(codec.in_order(lambda x: x * x, range(100))) == [x * x for x in range(100)]
    with pytest.raises(ZeroDivisionError):
        list(codec.in_order(lambda x: 1 // x, [1, 2, 0, 3]))
