"""Centroids on the integer grid against brute force and against the free optimum."""

from itertools import combinations

import numpy as np
import pytest

from rkf.cluster import grid, histogram, kmeans
from rkf.cluster.histogram import Histogram


def cost(histogram, centroids):
    return histogram.mass @ np.abs(histogram.values[:, None] - centroids.astype(np.float64)).min(axis=1) ** 2


def histogram_of(seed, n, low, high):
    rng = np.random.default_rng(seed)
    values = np.unique(rng.uniform(low, high, n))
    return Histogram(values, rng.integers(1, 9, values.size).astype(np.float64))


@pytest.mark.parametrize("seed", range(8))
def test_points_are_the_best_for_their_scale(seed):
    # All values lie within two steps of the grid's middle. So do the best points, few enough to try all of them.
    found = histogram_of(seed, 40, -4.0, 4.0)
    _, points = grid.optimal_points(found, 1.0, 3)
    tried = min(combinations(range(-5, 6), 3), key=lambda chosen: cost(found, np.array(chosen)))
    assert cost(found, points - grid.LIMIT) == pytest.approx(cost(found, np.array(tried)), rel=1e-12)


@pytest.mark.parametrize(("k", "most"), [(2, 1.001), (16, 1.002), (32, 1.01), (64, 1.06), (128, 1.12)])
def test_is_nearly_as_good_as_free_centroids(k, most):
    weights = np.random.default_rng(k).standard_normal(200_000).astype(np.float32)
    weights = weights[np.abs(weights) < 3.3].reshape(1, -1)  # without the 0.1 % that exceptions take
    found = histogram.of_weights(weights, np.ones((1, 1), np.float32), weights.size).merged()
    centroids, scale = grid.centroids(found, k)
    assert np.array_equal(centroids, np.rint(centroids))
    assert np.abs(centroids).max() <= grid.LIMIT
    assert np.all(np.diff(centroids) > 0)
    free = cost(found, kmeans.centroids(found, k))
    assert free <= cost(found, centroids * np.float64(scale)) <= most * free


@pytest.mark.parametrize("seed", range(4))
def test_points_in_groups_are_the_best_for_their_scale(seed, monkeypatch):
    monkeypatch.setattr(grid, "_GROUPED", 8)
    found, steps = histogram_of(seed, 40, -12.0, 12.0), (1, 3)
    value, points = grid.grouped_points(found, 1.0, steps)
    tried = [
        np.array([low + n * a for n in range(4)] + [high + n * b for n in range(4)])
        for a in steps
        for b in steps
        for low in range(-13, 10)
        for high in range(low + 3 * a + 1, 13)
    ]
    best = min(cost(found, each) for each in tried)
    assert cost(found, points - grid.LIMIT) == pytest.approx(best, rel=1e-12)
    assert value == pytest.approx(best - found.mass @ found.values**2, rel=1e-9)


@pytest.mark.parametrize(("form", "grouped"), [("standard_normal", True), ("laplace", False)])
def test_64_points_are_in_groups_where_that_costs_little(form, grouped):
    weights = getattr(np.random.default_rng(0), form)(size=100_000).astype(np.float32).reshape(1, -1)
    found = histogram.of_weights(weights, np.ones((1, 1), np.float32), weights.size).merged()
    centroids, scale = grid.centroids(found, 64)
    steps = np.diff(centroids.reshape(16, 4))
    assert ((steps == steps[:, :1]).all() and len(np.unique(steps)) <= 4) == grouped
    trials = [grid.optimal_points(found, scale * change, 64)[0] for change in (0.7, 0.8, 0.9, 1)]
    assert cost(found, centroids * np.float64(scale)) <= 1.04 * (found.mass @ found.values**2 + min(trials))


def test_all_255_points():
    found = histogram_of(1, 5000, -1.0, 1.0)
    centroids, scale = grid.centroids(found, 255)
    assert np.array_equal(centroids, np.arange(-127, 128))
    assert scale == pytest.approx(1 / 127, rel=0.01)


def test_the_scale_survives_any_magnitude():
    for magnitude in (1e-30, 1e30):
        found = histogram_of(2, 500, -magnitude, magnitude)
        centroids, scale = grid.centroids(found, 16)
        assert cost(found, centroids * np.float64(scale)) < 0.01 * (found.mass @ found.values**2)


def entropy(histogram, centroids, scale):
    nearest = np.abs(histogram.values[:, None] - scale * centroids).argmin(axis=1)
    shares = np.bincount(nearest, histogram.mass) / histogram.mass.sum()
    return -np.sum(shares[shares > 0] * np.log2(shares[shares > 0]))


@pytest.mark.parametrize(("k", "bits"), [(16, 3.0), (32, 4.0), (64, 4.5)])
def test_even_steps_have_the_entropy_wanted_and_err_less_for_it(k, bits):
    weights = np.random.default_rng(k).standard_t(6, 100_000).astype(np.float32)
    weights = weights[np.abs(weights) < 5.9].reshape(1, -1)  # without the 0.1 % that exceptions take
    found = histogram.of_weights(weights, np.ones((1, 1), np.float32), weights.size).merged()
    points, step = grid.even(found, k, bits)
    assert np.array_equal(points, np.arange(k) - k // 2)
    assert entropy(found, points, step) == pytest.approx(bits, abs=0.02)
    smallest = next(n for n in range(2, 99) if entropy(found, *pair(kmeans.centroids(found, n))) > bits)
    assert cost(found, step * points) < cost(found, kmeans.centroids(found, smallest))


def pair(centroids):
    return centroids, 1.0
