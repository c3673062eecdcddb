"""A file that is written and read gives the same bits, raw and packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rkf
from rkf.file.archive import pack, unpack
from rkf.file.writer import Writer
from rkf.format.matrix import ClusteredMatrix, DenseTensor, to_f32
from rkf.model.metadata import ModelMetadata
from tests.format import build
from tests.format.first_form_metadata import metadata_of

NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=20)


def bits(weights: np.ndarray) -> np.ndarray:
    return weights.view(np.uint32)


def reference(matrix: ClusteredMatrix) -> np.ndarray:
    """The weights by the normative formula, one weight at a time."""
    weights = np.empty((matrix.rows, matrix.columns), np.float32)
    indices, affine = matrix.indices(), matrix.affine
    for row in range(matrix.rows):
        for column in range(matrix.columns):
            weight = matrix.centroids[row // matrix.rows_per_table, indices[row, column]]
            if affine is not None:
                place = {"tensor": (0,), "row": (row,)}.get(affine.granularity) or (row, column // (affine.group or 1))
                if affine.a is not None:
                    weight = np.float32(affine.a[place]) * weight
                if affine.b is not None:
                    weight = weight + np.float32(affine.b[place])
            weights[row, column] = weight
    if matrix.exceptions is not None:
        values = to_f32(matrix.exceptions.values, matrix.exceptions.dtype)
        weights.reshape(-1)[matrix.exceptions.positions] = values
    return weights.reshape(matrix.shape)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=st.dictionaries(NAMES, build.matrices(), min_size=1, max_size=3))
def test_any_clustered_tensor_comes_back(tmp_path: Path, tensors: dict[str, ClusteredMatrix]) -> None:
    path = tmp_path / "m.rkf"
    with Writer(path, metadata={}, provenance={}, force=True) as writer:
        for name in sorted(tensors):
            writer.add(name, tensors[name], {"error": 0.5})
    with rkf.open(path) as container:
        assert list(container.tensors) == sorted(tensors)
        for name, expected in tensors.items():
            got = container.load(name)
            assert isinstance(got, ClusteredMatrix)
            assert (got.shape, got.k, got.rows_per_table) == (expected.shape, expected.k, expected.rows_per_table)
            assert [plane.tobytes() for plane in got.planes] == [plane.tobytes() for plane in expected.planes]
            np.testing.assert_array_equal(got.counts, expected.counts)
            np.testing.assert_array_equal(bits(got.decode()), bits(reference(expected)))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=st.dictionaries(NAMES, build.matrices(), min_size=1, max_size=3))
def test_packing_any_file_is_undone_to_the_byte(tmp_path: Path, tensors: dict[str, ClusteredMatrix]) -> None:
    path, packed, back = (tmp_path / name for name in ("m.rkf", "packed.rkf", "back.rkf"))
    with Writer(path, metadata={}, provenance={}, force=True) as writer:
        for name in sorted(tensors):
            writer.add(name, tensors[name])
    pack(path, packed, force=True)
    unpack(packed, back, force=True)
    assert back.read_bytes() == path.read_bytes()
    with rkf.open(packed) as container:
        for name, expected in tensors.items():
            np.testing.assert_array_equal(bits(container.decode(name)), bits(expected.decode()))


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 65), (2, 3, 5), (2, 1, 3, 9)])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_dense_tensors_come_back(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    width = "<u4" if dtype == "f32" else "<u2"
    patterns = np.random.default_rng(0).integers(0, np.iinfo(width).max, shape, dtype=width)  # NaN and infinity too
    data = patterns.view("<f4" if dtype == "f32" else "<f2" if dtype == "f16" else "<u2")
    with Writer(tmp_path / "m.rkf", metadata={}, provenance={}) as writer:
        writer.add("w", DenseTensor(dtype, data))
    with rkf.open(tmp_path / "m.rkf") as container:
        got = container.load("w")
        assert isinstance(got, DenseTensor)
        assert (got.dtype, got.shape, got.data.tobytes()) == (dtype, shape, data.tobytes())


def test_a_tiny_model_comes_back(tmp_path: Path) -> None:
    path = build.write_model(tmp_path / "model.rkf")
    with rkf.open(path) as container:
        assert container.metadata["model"] == metadata_of(build.CONFIG)
        assert container.model == ModelMetadata.of_first_form(metadata_of(build.CONFIG), container.tensors)
        assert container.provenance == {"source": "random"}
        for name, tensor in build.model_tensors():
            entry = container.tensors[name]
            assert entry.kind == {"Alias": "alias", "DenseTensor": "dense"}.get(type(tensor).__name__, "clustered")
            assert dict(entry.stats) == ({} if entry.kind == "alias" else {"error": 0.25})
        for name, data in build.BLOBS.items():
            assert container.blob(name) == data
        tied = container.decode("lm_head.weight")
        np.testing.assert_array_equal(bits(tied), bits(container.decode("model.embed_tokens.weight")))
        assert container.tensors["lm_head.weight"].shape == tied.shape


def test_the_same_calls_write_the_same_bytes(tmp_path: Path) -> None:
    first, second = (build.write_model(tmp_path / name).read_bytes() for name in ("a.rkf", "b.rkf"))
    assert first == second


def test_raw_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    with rkf.open(build.write_model(tmp_path / "model.rkf")) as container:
        matrix = container.load("model.embed_tokens.weight")
        again = container.load("model.embed_tokens.weight")
        assert isinstance(matrix, ClusteredMatrix)
        assert isinstance(again, ClusteredMatrix)
        assert all(np.shares_memory(a, b) for a, b in zip(matrix.planes, again.planes, strict=True))
        assert not matrix.planes[0].flags.writeable
        assert not matrix.centroids.flags.writeable
