"""The ledger adds up, and its figures match their definition."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import rkf
from rkf.errors import UsageError
from rkf.file.archive import pack
from rkf.file.footprint import coded_bits, footprint
from rkf.file.values import write_values
from rkf.file.writer import Writer
from rkf.format.codec import compressed_blob
from rkf.format.matrix import ClusteredMatrix, DenseTensor
from tests.format import build


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return build.write_model(tmp_path / "m.rkf")


def test_every_byte_is_counted_once(path: Path) -> None:
    ledger = footprint(path)
    sections = ledger["sections"]
    assert sum(sections.values()) == ledger["file_bytes"] == path.stat().st_size
    assert sections["tokenizer.json"] == sum(map(len, compressed_blob(build.TOKENIZER)))
    tensors = [tensor for _, tensor in build.model_tensors()]
    matrices = [tensor for tensor in tensors if isinstance(tensor, ClusteredMatrix)]
    assert sections["dense"] == sum(t.data.nbytes for t in tensors if isinstance(t, DenseTensor))
    assert sections["counts"] == sum(m.counts.nbytes for m in matrices)
    assert sections["centroids"] == sum(m.centroids.nbytes for m in matrices)
    assert sections["exception_positions"] == sum(m.exceptions.positions.nbytes for m in matrices if m.exceptions)
    assert sections["exception_values"] == sum(m.exceptions.values.nbytes for m in matrices if m.exceptions)
    factors = [factor for m in matrices if m.affine for factor in (m.affine.a, m.affine.b)]
    assert sections["affine"] == sum(factor.nbytes for factor in factors if factor is not None)
    widths = {4: "ranks_4bit", 2: "ranks_2bit", 1: "ranks_1bit"}
    planes: Counter[str] = Counter()
    for matrix in matrices:
        for plane, width in zip(matrix.planes, rkf.format.constants.plane_bits(matrix.bits), strict=True):
            planes[widths[width]] += plane.nbytes
    assert {key: sections[key] for key in widths.values()} == planes
    json.dumps(ledger)


def test_bits_per_weight(path: Path) -> None:
    ledger = footprint(path)
    tensors = [tensor for _, tensor in build.model_tensors() if not isinstance(tensor, rkf.format.matrix.Alias)]
    clustered = sum(math.prod(t.shape) for t in tensors if isinstance(t, ClusteredMatrix))
    weights = sum(math.prod(t.shape) for t in tensors)
    assert (ledger["weights"], ledger["clustered_weights"]) == (weights, clustered)
    assert ledger["bits_per_weight"] == 8 * ledger["file_bytes"] / weights
    keys = ("ranks_4bit", "ranks_2bit", "ranks_1bit", "counts", "centroids", "affine")
    keys = (*keys, "exception_positions", "exception_values")
    assert ledger["clustered_bits_per_weight"] == 8 * sum(ledger["sections"][key] for key in keys) / clustered
    assert [row["k"] for row in ledger["widths"]] == [5, 16, 24, 64]
    assert sum(row["weights"] for row in ledger["widths"]) == clustered


def test_entropy() -> None:
    assert coded_bits(np.array([[1, 1, 1, 1]], np.uint64)) == 8
    assert coded_bits(np.array([[9, 0]], np.uint64)) == 0
    assert coded_bits(np.array([[0, 0]], np.uint64)) == 0
    assert not np.signbit(coded_bits(np.array([[9, 0]], np.uint64))), "-0.0 cannot be written"
    assert coded_bits(np.array([[4, 4], [8, 0]], np.uint64)) == 8
    shares = np.array([0.5, 0.25, 0.25])
    expected = 100 * -(shares * np.log2(shares)).sum()
    assert coded_bits(np.array([[50, 25, 25]], np.uint64)) == pytest.approx(expected)


def test_an_estimate_beside_the_real_archive(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    indices = np.clip(rng.normal(7.5, 2.5, (512, 512)), 0, 15).astype(np.uint8)
    counts = np.bincount(indices.ravel(), minlength=16).astype(np.uint64)[None]
    matrix = ClusteredMatrix(
        (512, 512), rkf.format.bitpack.pack(indices, 4), counts, np.arange(16, dtype=np.float32)[None], 512, "bf16"
    )
    with Writer(tmp_path / "m.rkf", metadata={}, provenance={}) as writer:
        writer.add("w", matrix)
    pack(tmp_path / "m.rkf", tmp_path / "p.rkf")
    raw, packed = footprint(tmp_path / "m.rkf"), footprint(tmp_path / "p.rkf")
    assert raw["entropy_coded_bytes"] < raw["file_bytes"]
    assert 1 <= packed["file_bytes"] / raw["entropy_coded_bytes"] < 1.02
    assert packed["entropy_bits_per_weight"] == raw["entropy_bits_per_weight"]
    assert sum(packed["sections"].values()) == packed["file_bytes"]


def test_ratio_to_the_source(path: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    source.mkdir()
    with pytest.raises(UsageError, match="neither"):
        footprint(path, source)
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json"):
        (source / name).write_bytes(bytes(1000))
    ledger = footprint(path, source)
    assert (ledger["source_bytes"], ledger["ratio"]) == (2000, 2000 / path.stat().st_size)
    assert footprint(path, source / "config.json")["source_bytes"] == 1000


def test_files_without_weights(path: Path, tmp_path: Path) -> None:
    with Writer(tmp_path / "empty.rkf", metadata={}, provenance={}):
        pass
    assert footprint(tmp_path / "empty.rkf")["bits_per_weight"] is None
    with rkf.open(path) as model:
        write_values(tmp_path / "v.rkv", model, {})
    ledger = footprint(tmp_path / "v.rkv")
    assert sum(ledger["sections"].values()) == ledger["file_bytes"]
    assert ledger["sections"]["centroids"] == footprint(path)["sections"]["centroids"]


def test_packed_values_have_a_line_of_their_own(path: Path) -> None:
    data = path.read_bytes()
    number = next(n for n, s in enumerate(build.directory_of(data)["sections"]) if s["kind"] == "values")
    path.write_bytes(build.packed_section(data, number))
    ledger = footprint(path)
    assert ledger["sections"]["values_packed"] > ledger["sections"]["centroids"] == 0
    assert sum(ledger["sections"].values()) == ledger["file_bytes"]
