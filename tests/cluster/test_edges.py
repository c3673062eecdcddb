"""Weights that real checkpoints rarely have: zeros of both signs, empty rows, extremes of f32, many shapes of small
matrices.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rkf.cluster import Rule, cluster
from rkf.cluster.kmeans import fill
from rkf.format.matrix import ClusteredMatrix, DenseTensor

RULES = st.builds(
    Rule,
    k=st.sampled_from([2, 3, 16, 64, 255]),
    grid=st.just(True),
    affine=st.sampled_from(["tensor", "row"]),
    exceptions=st.sampled_from([0.0, 0.05, 0.125]),
    rows_per_table=st.sampled_from([None, 3]),
) | st.builds(
    Rule,
    k=st.sampled_from([2, 3, 16, 64, 256]),
    affine=st.sampled_from(["none", "row"]),
    affine_dtype=st.sampled_from(["f16", "f32"]),
    exceptions=st.sampled_from([0.0, 0.05, 0.125]),
    rows_per_table=st.sampled_from([None, 3]),
)
FINITE = st.floats(-(2.0**60), 2.0**60, width=32)


@settings(deadline=None, max_examples=60)
@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=3, max_side=6), elements=FINITE), RULES)
def test_any_weights_make_a_legal_matrix(weights, rule):
    matrix, stats = cluster(DenseTensor("f32", weights), rule, "w")
    if not isinstance(matrix, ClusteredMatrix):
        assert np.unique(weights).size == 1
        return
    decoded = matrix.decode()
    assert decoded.shape == weights.shape
    assert np.all(np.isfinite(decoded))
    assert np.all(np.isfinite(matrix.centroids)) and np.all(np.diff(matrix.centroids) > 0)
    assert matrix.affine is None or np.all(matrix.affine.a > 0)
    assert matrix.indices().max() < rule.k
    assert matrix.counts.sum() == weights.size
    assert stats["relative_error"] <= 1.0001


def test_zeros_of_both_signs_are_one_value():
    weights = np.array([[0.0, -0.0, 1.0], [2.0, -0.0, 0.0]], np.float32)
    matrix, stats = cluster(DenseTensor("f32", weights), Rule(k=3), "w")
    assert matrix.centroids.tolist() == [[0, 1, 2]]
    assert matrix.counts.tolist() == [[4, 1, 1]]
    assert stats["relative_error"] == 0


@pytest.mark.parametrize("affine_dtype", ["f16", "f32"])
def test_rows_of_zeros_decode_to_next_to_nothing(affine_dtype):
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    weights[7] = 0
    rule = Rule(k=16, grid=True, affine="row", affine_dtype=affine_dtype)
    matrix, _ = cluster(DenseTensor("f32", weights), rule, "w")
    assert matrix.affine.a.dtype == {"f16": np.float16, "f32": np.float32}[affine_dtype]
    assert np.abs(matrix.decode()[7]).max() < 1e-5


def test_factors_too_small_for_f16_are_f32():
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) * np.float32(1e-6)
    matrix, stats = cluster(DenseTensor("f32", weights), Rule(k=16, grid=True, affine="row"), "w")
    assert matrix.affine.a.dtype == np.float32
    assert stats["relative_error"] < 0.02


def test_fewer_values_than_k_are_filled_upwards_with_the_next_ones():
    weights = np.array([[0.5, -0.25], [0.5, 0.5]], np.float32)
    matrix, _ = cluster(DenseTensor("f32", weights), Rule(k=4), "w")
    one_up = np.nextafter(np.float32(0.5), np.float32(1))
    assert matrix.centroids[0, :3].tolist() == [-0.25, 0.5, one_up]
    assert matrix.counts.tolist() == [[1, 3, 0, 0]]


def test_at_the_top_of_f32_the_filling_goes_below():
    top = np.finfo(np.float32).max
    filled = fill(np.array([0, top], np.float32), 4)
    assert np.all(np.isfinite(filled)) and np.all(np.diff(filled) > 0)
    assert filled[-2:].tolist() == [0, top]


def test_a_table_may_be_all_exceptions():
    weights = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    weights[0] *= 1000
    matrix, _ = cluster(DenseTensor("f32", weights), Rule(k=4, exceptions=0.0625, rows_per_table=1), "w")
    assert matrix.decode()[0] == pytest.approx(weights[0], rel=2**-11)
