"""Weights to the index of their nearest centroid. Knows no fitting.

A weight in the middle of two centroids takes the lower one.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rkf.matrix import F32

U8 = NDArray[np.uint8]


def nearest(weights: F32, centroids: F32, scale: F32, group: int) -> U8:
    """The index of the centroid nearest to weight / scale, `u8[rows, cols]`.

    weights: f32[rows, cols]; centroids: f32[k]; scale: f32[rows, groups] > 0, one for each `group` columns.
    """
    indices = np.empty(weights.shape, np.uint8)
    _nearest(weights, middles(centroids), scale, group, indices)
    return indices


def middles(centroids: F32) -> F32:
    """The largest f32 that is nearer to each centroid than to the next: f32[k - 1]."""
    wide = centroids.astype(np.float64)
    middle = (wide[:-1] + wide[1:]) / 2
    rounded = middle.astype(np.float32)
    return np.where(rounded > middle, np.nextafter(rounded, np.float32(-np.inf)), rounded)


@njit(cache=True, nogil=True)
def _nearest(weights, middle, scale, group, indices):
    # A count of the middles below, over a block of columns at a time: compares only, which vectorise to 16 a cycle or
    # so.
    rows, columns = weights.shape
    block = 256
    values = np.empty(block, np.float32)
    below = np.empty(block, np.uint8)
    for r in range(rows):
        for g in range(scale.shape[1]):
            inverse = np.float32(1) / scale[r, g]
            end = min(columns, (g + 1) * group)
            for start in range(g * group, end, block):
                n = min(block, end - start)
                for i in range(n):
                    values[i] = weights[r, start + i] * inverse
                    below[i] = 0
                for m in range(middle.size):
                    edge = middle[m]
                    for i in range(n):
                        below[i] += np.uint8(values[i] > edge)
                for i in range(n):
                    indices[r, start + i] = below[i]
