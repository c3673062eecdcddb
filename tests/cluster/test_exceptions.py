"""The largest weights: exactly that many, and unchanged."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rkf.cluster import Rule, cluster, exceptions
from rkf.format.matrix import DenseTensor, from_f32


@settings(deadline=None)  # the first call compiles
@given(arrays(np.float32, (13, 11), elements=st.floats(-100, 100, width=32)), st.sampled_from([0.0, 0.005, 0.1, 0.125]))
def test_are_the_largest_and_of_equals_the_first(weights, share):
    flat = weights.reshape(-1)
    order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
    assert exceptions.largest(weights, share).tolist() == sorted(order[: int(share * flat.size)])


def test_rows_are_whole_and_the_share_is_of_the_others():
    weights = np.random.default_rng(1).standard_normal((40, 11)).astype(np.float32)
    rows = np.array([30, 2])
    others = weights.copy()
    others[rows] = 0
    expected = np.zeros(weights.shape, bool)
    expected[rows] = True
    expected.reshape(-1)[exceptions.largest(others, 0.05)] = True
    positions = exceptions.largest(weights, 0.05, rows)
    assert positions.tolist() == np.flatnonzero(expected).tolist()
    assert positions.size == 22 + 22
    np.testing.assert_array_equal(exceptions.mask(positions, (7, 11), 28), expected[28:35])


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_sixteen_bit_sources_keep_them_exactly(dtype):
    values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    dense = DenseTensor(dtype, from_f32(values, dtype))
    matrix, _ = cluster(dense, Rule(k=16, exceptions=0.01), "w")
    assert matrix.exceptions.dtype == dtype
    assert matrix.exceptions.positions.dtype == np.uint32
    kept = matrix.exceptions.positions
    assert kept.size == 40
    assert np.array_equal(matrix.decode().reshape(-1)[kept], dense.decode().reshape(-1)[kept])


@pytest.mark.parametrize(("magnitude", "dtype"), [(1.0, "f16"), (1e-6, "f32"), (1e6, "f32")])
def test_an_f32_source_takes_two_bytes_where_they_hold(magnitude, dtype):
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) * np.float32(magnitude)
    matrix, _ = cluster(DenseTensor("f32", weights), Rule(k=16, exceptions=0.01), "w")
    kept = matrix.exceptions.positions
    assert matrix.exceptions.dtype == dtype
    assert matrix.decode().reshape(-1)[kept] == pytest.approx(weights.reshape(-1)[kept], rel=2**-11)


def test_one_huge_weight_does_not_cost_the_others():
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    weights[3, 5] = 1000
    _, without = cluster(DenseTensor("f32", weights), Rule(k=16), "w")
    _, with_it = cluster(DenseTensor("f32", weights), Rule(k=16, exceptions=0.001), "w")
    assert with_it["relative_error"] < without["relative_error"]
