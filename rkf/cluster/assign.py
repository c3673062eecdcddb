"""Weights to the index of their nearest centroid. Knows no fitting.

A weight exactly between two centroids takes the lower one.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rkf.format.matrix import F32

U8 = NDArray[np.uint8]


def nearest(weights: F32, centroids: F32, scale: F32, group: int) -> U8:
    """The index of the centroid nearest to weight / scale, `u8[rows, cols]`.

    weights: f32[rows, cols]; centroids: f32[k]; scale: f32[rows, groups] > 0, one for every `group` columns.
    """
    middle = np.append(middles(centroids), np.float32(np.inf))
    indices = np.empty(weights.shape, np.uint8)
    _nearest(weights, middle, _first_index(middle), scale, group, indices)
    return indices


def middles(centroids: F32) -> F32:
    """The largest f32 that is not nearer to the next centroid: f32[k - 1]."""
    wide = centroids.astype(np.float64)
    middle = (wide[:-1] + wide[1:]) / 2
    rounded = middle.astype(np.float32)
    return np.where(rounded > middle, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def _first_index(middle: F32) -> U8:
    """The index of the lowest value whose bits begin with each of the 65,536 patterns: u8[65536]."""
    patterns = np.arange(1 << 16, dtype=np.uint32) << 16
    lowest = np.where(patterns >> 31, patterns | 0xFFFF, patterns).view(np.float32)
    return np.searchsorted(middle[:-1], lowest).astype(np.uint8)


@njit(cache=True, nogil=True)
def _nearest(weights, middle, first, scale, group, indices):
    # The high half of a weight's bits leaves one or two candidate indices: 65,536 entries, 64 KiB, stay in cache.
    for r in range(weights.shape[0]):
        for g in range(scale.shape[1]):
            inverse = np.float32(1) / scale[r, g]
            for c in range(g * group, min(weights.shape[1], (g + 1) * group)):
                value = np.float32(weights[r, c] * inverse)
                index = first[value.view(np.uint32) >> np.uint32(16)]
                while value > middle[index]:
                    index += np.uint8(1)
                indices[r, c] = index
