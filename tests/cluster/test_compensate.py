"""Error-compensated assignment against brute force and the textbook loop."""

import numpy as np
import pytest

from rkf.cluster import Rule, cluster
from rkf.cluster.compensate import Objective, compensated, descended
from rkf.format.matrix import DenseTensor

CENTROIDS = np.array([-1.5, -0.5, 0.25, 1.0], np.float32)


def problem(columns, rows, seed=0):
    """Weights f32[rows, cols] and correlated second moments f64[cols, cols]."""
    random = np.random.Generator(np.random.Philox(seed))
    inputs = random.standard_normal((4 * columns, columns)) @ random.standard_normal((columns, columns))
    return random.standard_normal((rows, columns)).astype(np.float32), inputs.T @ inputs / len(inputs)


def turned(weights, objective):
    return np.ascontiguousarray(weights.T[objective.order])


def cost(weights, quantised, objective):
    """The cost of each row, f64[rows]; the arguments are transposed."""
    error = (weights - quantised).astype(np.float64)
    return np.einsum("cr,cd,dr->r", error, objective.moments.astype(np.float64), error)


def textbook(weights, moments, order, exact):
    """GPTQ by its definition: quantise a column, then let the columns after it compensate the error."""
    inverse = np.linalg.inv(moments[np.ix_(order, order)])
    left, out = weights[:, order].astype(np.float64), np.empty(weights.shape)
    for c in range(weights.shape[1]):
        nearest = CENTROIDS[np.abs(left[:, c, None] - CENTROIDS).argmin(axis=1)]
        out[:, c] = np.where(exact[:, order[c]], weights[:, order[c]], nearest)
        error = (left[:, c] - out[:, c]) / inverse[0, 0]
        left[:, c:] -= error[:, None] * inverse[0]
        inverse = (inverse - np.outer(inverse[0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return out.T


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (7, 300), (65, 9), (130, 257)])
def test_equals_the_textbook(columns, rows):
    weights, moments = problem(columns, rows)
    objective = Objective.of(moments, 0.01)
    damped = moments + 0.01 * np.diagonal(moments).mean() * np.eye(columns)
    exact = np.abs(weights) > 2
    got = compensated(turned(weights, objective), objective, CENTROIDS, turned(exact, objective))
    expected = textbook(weights, damped, objective.order, exact)
    # A weight near the middle of two centroids may round to either side, and the rest of its row follows.
    same = np.isclose(got, expected, atol=2e-3).all(axis=0)
    assert same.mean() > 0.95


def test_factors_give_the_moments_back():
    _, moments = problem(70, 1)
    objective = Objective.of(moments, 0.05)
    diagonal = np.linalg.solve(objective.feedback.astype(np.float64), objective.moments)
    scale = np.diagonal(np.linalg.solve(objective.feedback.astype(np.float64), diagonal.T))
    np.testing.assert_allclose(
        (objective.feedback * scale) @ objective.feedback.T, objective.moments, rtol=2e-3, atol=1e-3
    )
    assert np.all(np.diff(np.diagonal(objective.moments)) <= 0)


@pytest.mark.parametrize("columns", [5, 64, 100])
def test_descent_ends_where_no_single_move_helps(columns):
    weights, moments = problem(columns, 40)
    objective = Objective.of(moments, 0.01)
    weights, exact = turned(weights, objective), np.zeros((columns, 40), bool)
    start = compensated(weights, objective, CENTROIDS, exact)
    end = descended(weights, start, objective, CENTROIDS, exact, passes=100)
    before, after = cost(weights, start, objective), cost(weights, end, objective)
    assert np.all(after <= before * (1 + 1e-5))
    for column in range(columns):
        for value in CENTROIDS:
            other = end.copy()
            other[column] = value
            assert np.all(cost(weights, other, objective) >= after * 0.98)  # gradients are made in eight bits


def test_exact_weights_stay():
    weights, moments = problem(20, 10)
    objective = Objective.of(moments, 0.0)
    weights = turned(weights, objective)
    exact = np.zeros((20, 10), bool)
    exact[3] = True
    start = compensated(weights, objective, CENTROIDS, exact)
    end = descended(weights, start, objective, CENTROIDS, exact, passes=100)
    np.testing.assert_array_equal(end[3], weights[3])
    assert np.isin(end[[0, 1, 2, 4]], CENTROIDS).all()


def test_moments_of_nothing_mean_nearest_centroids():
    weights, _ = problem(10, 10)
    objective = Objective.of(np.zeros((10, 10)), 0.01)
    got = compensated(turned(weights, objective), objective, CENTROIDS, np.zeros((10, 10), bool))
    nearest = CENTROIDS[np.abs(weights[..., None] - CENTROIDS).argmin(axis=-1)]
    np.testing.assert_array_equal(got, turned(nearest, objective))


@pytest.mark.parametrize(
    "rule",
    [
        Rule(k=8, exceptions=0.01),
        Rule(k=8, grid=True, affine="tensor", exceptions=0.01),
        Rule(k=8, grid=True, affine="row"),
        Rule(k=8, exceptions=0.01, rows_per_table=48),
    ],
)
def test_a_clustered_matrix_serves_its_layer_better(rule):
    weights, moments = problem(80, 96)
    tensor = DenseTensor("f32", weights)
    objective = Objective.of(moments, 0.01)

    def output_error(matrix):
        error = (matrix.decode() - weights).astype(np.float64)
        return np.einsum("rc,cd,rd->", error, moments, error)

    plain, _ = cluster(tensor, rule, "w")
    suited, _ = cluster(tensor, rule, "w", objective)
    assert output_error(suited) < 0.7 * output_error(plain)
    np.testing.assert_array_equal(suited.centroids, plain.centroids)
    assert suited.counts.sum() == weights.size
    if suited.exceptions is not None:
        np.testing.assert_array_equal(suited.exceptions.positions, plain.exceptions.positions)
        np.testing.assert_array_equal(suited.exceptions.values, plain.exceptions.values)


def test_an_objective_leaves_a_lossless_matrix_lossless():
    weights = np.sign(problem(16, 16)[0])
    matrix, _ = cluster(DenseTensor("f32", weights), Rule(k=8), "w", Objective.of(problem(16, 1)[1], 0.01))
    np.testing.assert_array_equal(matrix.decode(), weights)
