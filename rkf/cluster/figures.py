"""What clustering did to a matrix, in numbers: counts of the indices, their entropy, the squared error. Knows no
fitting.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rkf.cluster.assign import U8
from rkf.matrix import F32


def counts(indices: U8, k: int) -> NDArray[np.uint64]:
    """How many weights have each index: u64[k]."""
    found = np.zeros((4, 256), np.uint64)
    _count(indices.reshape(-1), found)
    return found.sum(axis=0)[:k]


def entropy_bits(counts: NDArray[np.uint64]) -> float:
    """Shannon entropy of the indices over all tables `counts: u64[tables, k]`, each table coded for itself, in bits a
    weight.
    """
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / totals
    bits = -np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return float((counts * bits).sum() / totals.sum())


def relative_error(
    weights: F32, indices: U8, centroids: F32, rows_per_table: int, scale: F32, group: int, exact: NDArray[np.int64]
) -> float:
    """Squared error / squared weights; the weights at the flat positions `exact`, ascending, have none.

    weights: f32[rows, cols]; centroids: f32[tables, k]; scale: f32[rows, groups], one for each `group` columns.
    """
    error, total = _squares(weights, indices, centroids, rows_per_table, scale, group, exact)
    return error / total


@njit(cache=True, nogil=True)
def _count(indices, found):
    for i in range(indices.size):  # four tables, so that equal neighbours do not wait for each other
        found[i & 3, indices[i]] += np.uint64(1)


@njit(cache=True, nogil=True)
def _squares(weights, indices, centroids, rows_per_table, scale, group, exact):
    error, total = 0.0, 0.0
    columns = weights.shape[1]
    for r in range(weights.shape[0]):
        table = centroids[r // rows_per_table]
        for g in range(scale.shape[1]):
            a = scale[r, g]
            for c in range(g * group, min(columns, (g + 1) * group)):
                weight = np.float64(weights[r, c])
                error += (weight - np.float64(a * table[indices[r, c]])) ** 2
                total += weight * weight
    for position in exact:
        r, c = position // columns, position % columns
        error -= (
            np.float64(weights[r, c]) - np.float64(scale[r, c // group] * centroids[r // rows_per_table, indices[r, c]])
        ) ** 2
    return max(error, 0.0), total
