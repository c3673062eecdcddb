"""Optimal centroids on the integer grid -127..127, with their scale. Knows no tensor.

An int8 kernel multiplies such centroids exactly. Rounding free centroids to the grid adds 1.4 % of squared error at
K = 32, 6 % at 64 and 20 % at 128. Choosing the points and the scale by dynamic programming adds 0.6, 2.5 and 8 %.

Of 64 points each four are evenly spaced, with at most four different steps, where that costs little: a CPU that looks
up 16 bytes at a time then needs three lookups and no blend (`runtime/kernels/int8_avx2.py`). It adds 2.6 % of squared
error for a Gaussian, and 11 % for a Laplace distribution, which keeps the points without groups.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rkf.cluster import kmeans
from rkf.cluster.histogram import F64, Histogram
from rkf.format.matrix import F32

LIMIT = 127
POINTS = 2 * LIMIT + 1
# The outermost free centroid is tried on each of these points. Smaller values make the grid coarser without gain. Past
# 127 the grid is finer but clips, which pays at K = 128 and above. The odd points would gain less than 0.1 %.
_REACHES = range(96, 162, 2)
_GROUPED, _GROUP = 64, 4  # the k whose points are in groups, and the points of a group
# The best three for a Gaussian; the last is for longer tails.
_STEPS = ((2, 3, 4, 8), (2, 3, 4, 9), (2, 3, 5, 9), (1, 2, 4, 10))
_GROUPED_REACHES = range(96, 124, 3)
_GROUPED_LOSS = 1.04  # the squared error of points in groups, at most, relative to that of the best points
_HALVINGS = 60  # bisection steps for the logarithm of the step size
_LEAST_REACH = 2.0**-110  # smaller weights are treated as zero: a scale and its inverse must be normal f32


def centroids(histogram: Histogram, k: int) -> tuple[F32, float]:
    """k integers in -127..127, ascending, `f32[k]`, and the scale that turns them into centroids.

    The integers have the least squared error for their scale, those of 64 in groups if that costs little. The scale is
    the best of those that put the outermost free centroid on a grid point. k is at most 255.
    """
    reach = max(float(np.abs(kmeans.centroids(histogram, k)).max()), _LEAST_REACH)
    scales = [reach / outermost for outermost in _REACHES]
    best = _least([(*optimal_points(histogram, scale, k), scale) for scale in scales])
    if k == _GROUPED:
        scales = [reach / outermost for outermost in _GROUPED_REACHES]
        grouped = _least([(*grouped_points(histogram, scale, steps), scale) for scale in scales for steps in _STEPS])
        squares = float(np.sum(histogram.mass * histogram.values**2))
        if squares + grouped[0] <= _GROUPED_LOSS * (squares + best[0]):
            best = grouped
    _, points, scale = best
    return (points - LIMIT).astype(np.float32), scale


def _least(trials: list[tuple[float, NDArray[np.int64], float]]) -> tuple[float, NDArray[np.int64], float]:
    """The (cost, points, scale) of the least cost."""
    return min(trials, key=lambda trial: trial[0])


def even(histogram: Histogram, k: int, bits: float) -> tuple[F32, float]:
    """k integers in even steps, `f32[k]`, and the step size that gives the nearest ranks an entropy of `bits`.

    For small steps, even steps are optimal under a constraint of entropy (Gish and Pierce 1968): compared with k-means
    at the same error they save 0.2 bit for a Gaussian, and more for longer tails. Values beyond the outermost step are
    clipped to it.
    """
    points = np.arange(k, dtype=np.float32) - k // 2
    shares = histogram.mass / histogram.mass.sum()
    low, high = _LEAST_REACH, max(float(np.abs(histogram.values).max()), 2 * _LEAST_REACH)
    for _ in range(_HALVINGS):
        step = (low * high) ** 0.5
        starts = np.flatnonzero(np.diff(np.rint(histogram.values / step), prepend=np.nan))
        used = np.add.reduceat(shares, starts)
        entropy = -np.sum(used * np.log2(used))
        low, high = (step, high) if entropy > bits else (low, step)
    return points, high


def optimal_points(histogram: Histogram, scale: float, k: int) -> tuple[float, NDArray[np.int64]]:
    """The least squared error at one scale, without the constant sum of squares, and the k grid points that reach it.

    Points are numbered 0..254, ascending: i64[k].
    """
    cost, points = _optimal_points(*_below_middles(histogram, scale), k)
    return cost * scale**2, points


def grouped_points(histogram: Histogram, scale: float, steps: tuple[int, ...]) -> tuple[float, NDArray[np.int64]]:
    """The same for 64 points of which four each, from the lowest on, are evenly spaced, by one of `steps`."""
    cost, points = _grouped_points(*_below_middles(histogram, scale), np.array(steps), _GROUPED // _GROUP)
    return cost * scale**2, points


def _below_middles(histogram: Histogram, scale: float) -> tuple[F64, F64]:
    """(Mass of the values up to each of `_MIDDLES`, their sums in units of the grid)."""
    below = np.searchsorted(histogram.values, scale * _MIDDLES, side="right")
    sums = _prefix(histogram.mass * (histogram.values / scale))
    return _prefix(histogram.mass)[below], sums[below]


# Half-integers: every possible middle between two grid points, and one past the end that covers the whole histogram.
_MIDDLES = np.append(np.arange(2 * POINTS - 1) / 2 - LIMIT, np.inf)


def _prefix(values: F64) -> F64:
    return np.concatenate(([0.0], np.cumsum(values)))


@njit(cache=True, nogil=True)
def _optimal_points(mass: F64, sums: F64, k: int) -> tuple[float, NDArray[np.int64]]:
    """The dynamic programme of kmeans.py over grid points: the least cost, and the k of 255 points that reach it.

    mass, sums: f64[510], over the values up to each of `_MIDDLES`, in units of the grid. A point c costs
    mass * c^2 - 2 * sums * c over its nearest values, which end at the middles to its neighbours. Grouped by middles,
    this is a sum over pairs of neighbours that obeys the quadrangle inequality.
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


@njit(cache=True, nogil=True)
def _pair(mass: F64, sums: F64, i: int, j: int) -> float:
    """What the neighbours i < j cost together (`_optimal_points`)."""
    a, b = i - LIMIT, j - LIMIT
    return (a * a - b * b) * mass[i + j] - 2 * (a - b) * sums[i + j]


@njit(cache=True, nogil=True)
def _grouped_points(mass: F64, sums: F64, steps: NDArray[np.int64], groups: int) -> tuple[float, NDArray[np.int64]]:
    """The least cost, and the points, as `_optimal_points` does, group by group."""
    inner = np.full((POINTS, steps.size), np.inf)
    for first in range(POINTS):
        for s in range(steps.size):
            if first + (_GROUP - 1) * steps[s] < POINTS:
                total = 0.0
                for n in range(_GROUP - 1):
                    total += _pair(mass, sums, first + n * steps[s], first + (n + 1) * steps[s])
                inner[first, s] = total
    # The least cost of all points up to the last of a group, by that; the step that it takes, and the end before it.
    cost = np.full(POINTS, np.inf)
    step = np.zeros((groups, POINTS), np.int16)
    before = np.zeros((groups, POINTS), np.int16)
    for group in range(groups):
        found = np.full(POINTS, np.inf)
        for first in range(POINTS):
            best, end = 0.0, -1
            if group > 0:
                best = np.inf
                for i in range(first):
                    value = cost[i] + _pair(mass, sums, i, first)
                    if value < best:
                        best, end = value, i
            for s in range(steps.size):
                value, last = best + inner[first, s], first + (_GROUP - 1) * steps[s]
                if last < POINTS and value < found[last]:
                    found[last], step[group, last], before[group, last] = value, steps[s], end
        cost = found
    end, least = -1, np.inf
    for j in range(POINTS):
        c = j - LIMIT
        value = cost[j] + c * c * mass[-1] - 2 * c * sums[-1]
        if value < least:
            end, least = j, value
    points = np.empty(groups * _GROUP, np.int64)
    for group in range(groups - 1, -1, -1):
        for n in range(_GROUP):
            points[group * _GROUP + n] = end - (_GROUP - 1 - n) * step[group, end]
        end = before[group, end]
    return least, points
