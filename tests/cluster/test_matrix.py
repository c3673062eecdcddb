"""cluster(): the result is as close as the rule allows, exact where possible, and has the same bytes every time."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from rkf.cluster import Rule, cluster
from rkf.cluster.compensate import objectives
from rkf.errors import SourceError
from rkf.format.matrix import ClusteredMatrix, DenseTensor, from_f32

RULES = {
    "plain": Rule(k=16),
    "exceptions": Rule(k=16, exceptions=0.01),
    "grid": Rule(k=16, grid=True, affine="tensor"),
    "row": Rule(k=32, affine="row", exceptions=0.001),
    "grid rows": Rule(k=64, grid=True, affine="row", exceptions=0.001),
    "wide": Rule(k=255, grid=True, affine="row"),
    "group": Rule(k=16, affine="group", group=32, affine_dtype="f32"),
    "tables": Rule(k=24, rows_per_table=16, exceptions=0.01),
    "grid tables": Rule(k=24, grid=True, affine="tensor", rows_per_table=16),
}


def tensor(dtype="bf16", shape=(48, 100), seed=0, scale=0.1):
    values = np.random.default_rng(seed).standard_t(5, shape).astype(np.float32) * np.float32(scale)
    return DenseTensor(dtype, from_f32(values, dtype))


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_decodes_to_the_error_that_it_reports(rule, dtype):
    dense = tensor(dtype)
    matrix, stats = cluster(dense, rule, "w")
    weights, decoded = dense.decode().astype(np.float64), matrix.decode()
    error = ((weights - decoded) ** 2).sum() / (weights**2).sum()
    assert error == pytest.approx(stats["relative_error"], rel=1e-2)
    assert error < {4: 0.04, 5: 0.01, 6: 0.004, 8: 0.0004}[matrix.bits]
    assert matrix.source_dtype == dtype
    assert matrix.k == rule.k
    assert np.all(np.diff(matrix.centroids) > 0)
    assert matrix.counts.sum() == weights.size


def test_not_a_number_is_refused_by_name():
    dense = tensor("f32")
    dense.data[3, 4] = np.nan
    with pytest.raises(SourceError, match=r"blk\.w: NaN or infinite"):
        cluster(dense, Rule(k=16), "blk.w")


def test_bytes_do_not_depend_on_threads():
    def everything(workers):
        with ThreadPoolExecutor(workers) as pool:
            matrices = pool.map(lambda rule: cluster(tensor("f32"), rule, "w")[0], list(RULES.values()) * 3)
            return [
                [plane.tobytes() for plane in m.planes] + [m.centroids.tobytes(), m.counts.tobytes()] for m in matrices
            ]

    assert everything(1) == everything(4)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_few_distinct_values_are_lossless(rule, dtype):
    values = np.random.default_rng(1).standard_normal(rule.k).astype(np.float32)
    dense = DenseTensor(dtype, from_f32(np.random.default_rng(2).choice(values, (48, 100)), dtype))
    matrix, stats = cluster(dense, rule, "w")
    assert np.array_equal(matrix.decode(), dense.decode())
    assert stats["relative_error"] == 0


def test_one_value_and_one_dimension_stay_dense():
    constant = DenseTensor("f32", np.full((8, 8), 0.5, np.float32))
    vector = DenseTensor("f32", np.arange(8, dtype=np.float32))
    assert cluster(constant, Rule(k=16), "w") == (constant, {})
    assert cluster(vector, Rule(k=16), "w") == (vector, {})
    assert isinstance(cluster(tensor(), Rule(k=16), "w")[0], ClusteredMatrix)


class Moments:
    """Of a stack whose experts saw different numbers of tokens."""

    def __init__(self, inputs):
        self._inputs = inputs
        self.counts = np.array([len(x) for x in inputs])

    def of(self, expert):
        x = self._inputs[expert].astype(np.float64)
        return x.T @ x / len(x)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_stack_is_its_matrices_one_after_the_other(rule, dtype):
    stack = tensor(dtype, shape=(3, 32, 100))
    with ThreadPoolExecutor(2) as pool:
        matrix, stats = cluster(stack, rule, "w", each=pool.map)
    assert matrix.rows_per_table == 32
    assert matrix.centroids.shape == (3, rule.k)
    alone = [cluster(DenseTensor(dtype, each), replace(rule, rows_per_table=None), "w")[0] for each in stack.data]
    np.testing.assert_array_equal(matrix.indices(), np.concatenate([each.indices() for each in alone]))
    np.testing.assert_array_equal(matrix.centroids, np.concatenate([each.centroids for each in alone]))
    np.testing.assert_allclose(matrix.decode(), np.stack([each.decode() for each in alone]), rtol=2**-10, atol=1e-6)
    assert stats["relative_error"] < 0.04


def test_an_expert_that_saw_few_tokens_is_clustered_without_data():
    random = np.random.default_rng(0)
    stack = tensor("f32", shape=(4, 32, 24))
    mixing = random.standard_normal((24, 24)).astype(np.float32)
    inputs = [random.standard_normal((n, 24)).astype(np.float32) @ mixing for n in (0, 1, 2, 2000)]
    rule = Rule(k=8, exceptions=0.01)
    plain, _ = cluster(stack, rule, "w")
    suited, _ = cluster(stack, rule, "w", objectives(Moments(inputs)))
    same = (plain.indices() == suited.indices()).reshape(4, -1).all(axis=1)
    assert same.tolist() == [True, True, False, False]
    errors = [np.square(inputs[3] @ (each.decode()[3] - stack.data[3]).T).sum() for each in (suited, plain)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("objective", [None, objectives(np.eye(256, dtype=np.float32))], ids=["nearest", "suited"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_a_table_is_in_f32_once(dtype, objective):
    """The largest take a gigabyte in f32."""
    table = tensor(dtype, (1 << 15, 256))
    cluster(tensor(dtype, (32, 256)), RULES["grid"], "w", objective)  # compiles, which takes memory
    tracemalloc.start()
    try:
        cluster(table, RULES["grid"], "w", objective)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * table.data.size  # 4 for f32; indices, and rows in work
