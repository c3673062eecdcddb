"""k-means against brute force and an independent dynamic programme."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkf.cluster import kmeans
from rkf.cluster.histogram import Histogram


def cost(histogram, centroids):
    """The cost of the clusters of these centroids, without the rounding of the centroids to f32."""
    nearest = np.abs(histogram.values[:, None] - centroids.astype(np.float64)).argmin(axis=1)
    edges = np.flatnonzero(np.diff(nearest, prepend=-1, append=centroids.size))
    return sum(interval_cost(histogram, a, b) for a, b in pairwise(edges))


def interval_cost(histogram, start, end):
    values, mass = histogram.values[start:end], histogram.mass[start:end]
    mean = values @ mass / mass.sum()
    return mass @ (values - mean) ** 2


def brute_force(histogram, k):
    n = histogram.values.size
    splits = ((0, *cuts, n) for cuts in combinations(range(1, n), k - 1))
    return min(sum(interval_cost(histogram, a, b) for a, b in pairwise(s)) for s in splits)


def quadratic_programme(histogram, k):
    n = histogram.values.size
    pair = np.full((n + 1, n + 1), np.inf)
    for start in range(n):
        for end in range(start + 1, n + 1):
            pair[start, end] = interval_cost(histogram, start, end)
    best = np.append(0.0, np.full(n, np.inf))
    for _ in range(k):
        best = (best[:, None] + pair).min(axis=0)
    return best[n]


def random_histogram(rng, n):
    values = np.unique(rng.standard_t(3, n).astype(np.float32)).astype(np.float64)
    return Histogram(values, rng.integers(1, 50, values.size).astype(np.float64))


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(7, 12))
def test_equals_brute_force(seed, k, n):
    histogram = random_histogram(np.random.default_rng(seed), n)
    assert cost(histogram, kmeans.centroids(histogram, k)) == pytest.approx(brute_force(histogram, k), rel=1e-9)


@pytest.mark.parametrize("k", [2, 3, 16, 61, 64, 100])
@pytest.mark.parametrize("offset", [0.0, 4096.0])
def test_equals_the_quadratic_programme(k, offset):
    histogram = random_histogram(np.random.default_rng(k), 160)
    histogram = Histogram((histogram.values + offset).astype(np.float32).astype(np.float64), histogram.mass)
    assert cost(histogram, kmeans.centroids(histogram, k)) == pytest.approx(quadratic_programme(histogram, k), rel=1e-9)
