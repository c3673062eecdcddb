"""Statistics of a clustered matrix: counts of the indices, their entropy, the squared error."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rkf.cluster.assign import U8
from rkf.file.footprint import coded_bits
from rkf.format.matrix import F32


def counts(indices: U8, k: int) -> NDArray[np.uint64]:
    """The number of weights with each index: u64[k]."""
    found = np.zeros((4, 256), np.uint64)
    _count(indices.reshape(-1), found)
    return found.sum(axis=0)[:k]


def entropy_bits(counts: NDArray[np.uint64]) -> float:
    """Shannon entropy in bits per index; each table of `counts: u64[tables, k]` has its own code."""
    return coded_bits(counts) / float(counts.sum())


def squares(weights: F32) -> float:
    """The sum of squared weights, in f64."""
    return float(_squares(weights.reshape(-1)))


def squared_error(weights: F32, indices: U8, centroids: F32, scale: F32, group: int) -> float:
    """The sum of squared differences between weights and scale * centroid; NaN weights are left out.

    weights: f32[rows, cols]; indices: u8[rows, cols]; centroids: f32[k]; scale: f32[rows, groups].
    """
    return float(_squared_error(weights, indices, centroids, scale, group))


@njit(cache=True, nogil=True)
def _count(indices, found):
    for i in range(indices.size):  # four tables, so equal neighbours do not wait for each other's increment
        found[i & 3, indices[i]] += np.uint64(1)


@njit(cache=True, nogil=True)
def _squares(weights):
    total = 0.0
    for weight in weights:
        total += np.float64(weight) ** 2
    return total


@njit(cache=True, nogil=True)
def _squared_error(weights, indices, centroids, scale, group):
    total = 0.0
    for r in range(weights.shape[0]):
        for g in range(scale.shape[1]):
            for c in range(g * group, min(weights.shape[1], (g + 1) * group)):
                difference = np.float64(weights[r, c]) - np.float64(scale[r, g] * centroids[indices[r, c]])
                if difference == difference:
                    total += difference**2
    return total
