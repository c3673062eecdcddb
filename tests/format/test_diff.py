"""Differences between two files, counted on the stored indices and values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rkf
from rkf.errors import UsageError
from rkf.file.archive import pack
from rkf.file.diff import diff
from rkf.file.values import write_values
from rkf.file.writer import Writer
from rkf.format.matrix import Affine, Alias, ClusteredMatrix, DenseTensor, Exceptions
from tests.format import build

RNG = np.random.default_rng(0)
MATRIX = build.clustered(RNG, (6, 40), 16, affine=Affine("tensor", None, np.ones(1, "<f4")), exceptions=4, dtype="f32")
DENSE = DenseTensor("f32", np.arange(1, 6, dtype="<f4"))


def write(path: Path, tensors: dict[str, Any], metadata: Any = None, blobs: Any = None) -> Path:
    with Writer(path, metadata=metadata or {}, provenance={}, force=True) as writer:
        for name in sorted(tensors):
            writer.add(name, tensors[name])
        for name, data in (blobs or {}).items():
            writer.blob(name, data)
    return path


def changed(tmp_path: Path, tensor: Any, old: Any = MATRIX) -> dict[str, Any]:
    """The output of diff for one tensor that changes into another."""
    a, b = write(tmp_path / "a.rkf", {"w": old}), write(tmp_path / "b.rkf", {"w": tensor})
    found = diff(a, b)
    json.dumps(found)
    return found["tensors"].get("w", {})


def test_equal_files_are_identical(tmp_path: Path) -> None:
    path = build.write_model(tmp_path / "m.rkf")
    pack(path, tmp_path / "p.rkf")
    for other in (path, tmp_path / "p.rkf"):
        found = diff(path, other)
        assert found["identical"]
        assert found["same_ranks"]
        assert found["same_dense"]
        assert not any(found[key] for key in ("metadata", "provenance", "blobs", "only_a", "only_b", "tensors"))


def test_moved_indices_are_counted(tmp_path: Path) -> None:
    indices = MATRIX.indices()
    indices[0, 0] ^= 1
    indices[5, 39] = (int(indices[5, 39]) + 8) % 16
    moved = changed(tmp_path, replace(MATRIX, planes=rkf.format.bitpack.pack(indices, 4)))
    assert (moved["indices_moved"], moved["indices_share"], moved["largest_move"]) == (2, 2 / 240, 8)
    assert moved["centroids_drifted"] == 0
    assert 0 < moved["relative_rms"] < 1


def test_drifted_centroids_are_counted(tmp_path: Path) -> None:
    centroids = MATRIX.centroids.copy()
    centroids[0, 15] += 2
    drifted = changed(tmp_path, replace(MATRIX, centroids=centroids))
    assert (drifted["indices_moved"], drifted["centroids_drifted"]) == (0, 1)
    assert drifted["largest_drift"] == pytest.approx(2, abs=1e-5)
    assert not drifted["affine_changed"]
    old, new = MATRIX.decode().astype(float), replace(MATRIX, centroids=centroids).decode().astype(float)
    assert drifted["relative_rms"] == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old))
    assert drifted["weights_changed"] == np.count_nonzero(new != old)


def test_factors_and_exceptions(tmp_path: Path) -> None:
    doubled = changed(tmp_path, replace(MATRIX, affine=Affine("tensor", None, np.full(1, 2, "<f4"))))
    assert doubled["affine_changed"]
    assert "affine" not in doubled
    by_row = changed(tmp_path, replace(MATRIX, affine=Affine("row", None, np.ones(6, "<f4"))))
    assert by_row["affine"] == ["tensor", "row"]
    assert by_row["weights_changed"] == 0
    without = changed(tmp_path, replace(MATRIX, affine=None, exceptions=None))
    assert without["affine"] == ["tensor", None]
    assert (without["exceptions_added"], without["exceptions_removed"]) == (0, 4)
    assert MATRIX.exceptions is not None
    positions = np.unique(np.append(MATRIX.exceptions.positions[1:], 239)).astype("<u4")
    other = Exceptions(positions, np.ones(len(positions), "<f4"), "f32")
    swapped = changed(tmp_path, replace(MATRIX, exceptions=other))
    assert swapped["exceptions_removed"] == 1


def test_another_k_or_kind_compares_weights(tmp_path: Path) -> None:
    coarser = changed(tmp_path, build.clustered(RNG, (6, 40), 8))
    assert coarser["k"] == [16, 8]
    assert "indices_moved" not in coarser
    assert "centroids_drifted" not in coarser
    dense = changed(tmp_path, DenseTensor("f32", MATRIX.decode()))
    assert (dense["kind"], dense["relative_rms"]) == (["clustered", "dense"], 0)
    reshaped = changed(tmp_path, build.clustered(RNG, (40, 6), 16))
    assert reshaped == {"shape": [[6, 40], [40, 6]]}


def test_dense_tensors_and_aliases(tmp_path: Path) -> None:
    more = changed(tmp_path, DenseTensor("f32", DENSE.data + 1), DENSE)
    assert more["weights_changed"] == 5
    from_zero = changed(tmp_path, DENSE, DenseTensor("f32", np.zeros(5, "<f4")))
    assert from_zero["relative_rms"] is None
    other = changed(tmp_path, DenseTensor("bf16", np.arange(5, dtype="<u2")), DENSE)
    assert other["source_dtype"] == ["f32", "bf16"]
    tensors = {"a": DENSE, "b": DENSE, "w": Alias("a")}
    first, second = write(tmp_path / "a.rkf", tensors), write(tmp_path / "b.rkf", {**tensors, "w": Alias("b")})
    assert diff(first, second)["tensors"] == {"w": {"target": ["a", "b"]}}


def test_values_files_are_compared_by_their_values(tmp_path: Path) -> None:
    path = write(tmp_path / "m.rkf", {"w": MATRIX})
    with rkf.open(path) as model:
        values = model.values("w")
        write_values(tmp_path / "a.rkv", model, {})
        write_values(tmp_path / "b.rkv", model, {"w": replace(values, centroids=values.centroids + 1)})
    found = diff(tmp_path / "a.rkv", tmp_path / "b.rkv")
    assert found["same_ranks"]
    assert found["tensors"]["w"]["centroids_drifted"] == 16
    assert not found["tensors"]["w"]["exception_values_changed"]
    assert diff(tmp_path / "a.rkv", tmp_path / "a.rkv")["identical"]
    with pytest.raises(UsageError, match="one of each"):
        diff(path, tmp_path / "a.rkv")


def test_metadata_blobs_and_sets_of_tensors(tmp_path: Path) -> None:
    first = write(tmp_path / "a.rkf", {"a": DENSE, "b": DENSE}, {"n": {"x": 1, "y": 2}}, {"x-1": b"1", "x-2": b"2"})
    second = write(tmp_path / "b.rkf", {"b": DENSE, "c": MATRIX}, {"n": {"x": 3}, "m": {}}, {"x-1": b"0", "x-2": b"2"})
    found = diff(first, second)
    assert found["metadata"] == {"m": [None, {}], "n.x": [1, 3], "n.y": [2, None]}
    assert (found["blobs"], found["only_a"], found["only_b"]) == (["x-1"], ["a"], ["c"])
    assert not found["identical"]
    assert not found["same_dense"]
    assert isinstance(MATRIX, ClusteredMatrix)
