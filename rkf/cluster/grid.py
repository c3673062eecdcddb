"""Optimal centroids on the integer grid -127..127, with the scale that suits them. Knows no tensor.

An int8 kernel multiplies such centroids exactly. Rounding free centroids afterwards would cost 2-4 % of squared error
at K = 32, 7-16 % at 64 and more than the error itself at 256; choosing among the 255 points by dynamic programming does
not.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rkf.cluster import kmeans
from rkf.cluster.histogram import F64, Histogram
from rkf.matrix import F32

LIMIT = 127
POINTS = 2 * LIMIT + 1
# The outermost free centroid is tried on each of these points. Further in the grid is coarser for nothing; past 127 it
# is finer and clips, which pays at K = 128 and above. Every second one: the others gain less than 0.1 % at K = 16 to
# 64.
_REACHES = range(96, 162, 2)


def centroids(histogram: Histogram, k: int) -> tuple[F32, float]:
    """k integers in -127..127, ascending, `f32[k]`, and the scale that turns them into weights at the least squared
    error.

    The integers are the exact optimum for their scale; of the scales, the best of those that put the outermost free
    centroid on a grid point. k is at most 255.
    """
    reach = float(np.abs(kmeans.centroids(histogram, k)).max()) or 1.0
    trials = [(*optimal_points(histogram, reach / outermost, k), reach / outermost) for outermost in _REACHES]
    _, points, scale = min(trials, key=lambda trial: trial[0])
    return (points - LIMIT).astype(np.float32), scale


def optimal_points(histogram: Histogram, scale: float, k: int) -> tuple[float, NDArray[np.int64]]:
    """The k grid points of least squared error at one scale, as numbers 0..254, ascending; before them that error, less
    the sum of squares, which no choice changes.
    """
    below = np.searchsorted(histogram.values, scale * _MIDDLES, side="right")
    sums = _prefix(histogram.mass * (histogram.values / scale))
    cost, points = _optimal_points(_prefix(histogram.mass)[below], sums[below], k)
    return cost * scale**2, points


# Half-integers: every possible middle between two grid points, and one past the end that takes the whole histogram.
_MIDDLES = np.append(np.arange(2 * POINTS - 1) / 2 - LIMIT, np.inf)


def _prefix(values: F64) -> F64:
    return np.concatenate(([0.0], np.cumsum(values)))


@njit(cache=True, nogil=True)
def _optimal_points(mass: F64, sums: F64, k: int) -> tuple[float, NDArray[np.int64]]:
    """The k of 255 grid points with the least squared error (less the sum of squares, which no choice changes),
    ascending.

    mass, sums: f64[510], over the values up to each of `_MIDDLES`, in units of the grid. A point c costs mass * c^2 - 2
    * sums * c over the values nearest to it, which the middles to its neighbours bound; regrouped by middles, the cost
    is a sum over pairs of neighbours, and obeys the quadrangle inequality (see kmeans.py).
    """
    cost = np.full(POINTS, 0.0)
    left = np.zeros((k, POINTS), np.int16)
    lower = np.zeros(POINTS)
    for layer in range(1, k):
        starts = left[layer]
        first, last = layer, POINTS - (k - layer)
        stride = 1
        while stride <= last - first + 1:
            stride *= 2
        while stride:
            for j in range(first - 1 + stride, last + 1, 2 * stride):
                low, high = layer - 1, j - 1
                if j - stride >= first:
                    low = starts[j - stride]
                if j + stride <= last:
                    high = min(high, starts[j + stride])
                best, where = np.inf, low
                b = j - LIMIT
                for i in range(low, high + 1):
                    a = i - LIMIT
                    value = cost[i] + (a * a - b * b) * mass[i + j] - 2 * (a - b) * sums[i + j]
                    if value < best:
                        best, where = value, i
                lower[j], starts[j] = best, where
            stride //= 2
        cost, lower = lower, cost

    end, least = k - 1, np.inf
    for j in range(k - 1, POINTS):
        c = j - LIMIT
        value = cost[j] + c * c * mass[-1] - 2 * c * sums[-1]
        if value < least:
            end, least = j, value
    points = np.empty(k, np.int64)
    for layer in range(k - 1, -1, -1):
        points[layer] = end
        end = left[layer, end]
    return least, points
