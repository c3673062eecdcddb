"""The factor a > 0 of each row or group of columns, by least squares to fixed ranks. Knows no k-means.

The offset b stays out: it costs as much as a second factor and every kernel an addition, for rows whose mean is close
to zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from rkf.cluster.assign import U8
from rkf.cluster.recipe import Rule
from rkf.matrix import F32, Affine

# The normal range of f16. A row of zeros (whose least squares say a = 0, which the format has not) takes the least of
# it.
_LEAST, _MOST = np.float32(2.0**-14), np.float32(65504)
# What an f32 factor is kept within, so that no division by it overflows.
_BOUND = np.float32(2.0**100)


def first_guess(weights: F32, group: int) -> F32:
    """The root mean square of each group of columns: f32[rows, groups]. weights: f32[rows, cols], NaN ones left out."""
    scale = np.empty((weights.shape[0], -(-weights.shape[1] // group)), np.float32)
    _root_mean_square(weights, group, scale)
    return scale


def least_squares(weights: F32, indices: U8, centroids: F32, scale: F32, group: int) -> F32:
    """The factors of least squared error for given ranks, f32[rows, groups]; where there is none above 0, the given one
    stays.
    """
    fitted = scale.copy()
    _least_squares(weights, indices, centroids, group, fitted)
    return fitted


def rounded(scale: F32, dtype: str) -> F32:
    """Factors as they will be stored: `dtype`, or f32 where `storage` says that f16 will not do."""
    within = np.clip(scale, 1 / _BOUND, _BOUND)
    return within.astype(_storage(within, dtype)).astype(np.float32)


def stored(scale: F32, rule: Rule, one_table: bool) -> Affine | None:
    """The factors `scale: f32[rows, groups]` in the form of the format; None where the rule has none.

    One factor for the tensor is f32. Where several tables share a tensor each has its own, so it is spread over their
    rows.
    """
    if rule.affine == "none":
        return None
    if rule.affine == "tensor":
        return Affine("tensor", None, scale[0]) if one_table else Affine("row", None, scale[:, 0])
    values = scale.astype(_storage(scale, rule.affine_dtype))
    return Affine("row", None, values[:, 0]) if rule.affine == "row" else Affine("group", rule.group, values)


def _storage(scale: F32, wanted: str) -> type[np.floating[Any]]:
    """float16 where it is wanted and holds the factors: none above its range, and none but near-empty rows below."""
    small = scale.min() < _LEAST and np.median(scale) < 64 * _LEAST
    return np.float16 if wanted == "f16" and scale.max() <= _MOST and not small else np.float32


@njit(cache=True, nogil=True)
def _root_mean_square(weights, group, scale):
    for r in range(weights.shape[0]):
        for g in range(scale.shape[1]):
            total, n = 0.0, 0
            for c in range(g * group, min(weights.shape[1], (g + 1) * group)):
                weight = np.float64(weights[r, c])
                if weight == weight:
                    total += weight * weight
                    n += 1
            scale[r, g] = np.float32(np.sqrt(total / max(n, 1)))


@njit(cache=True, nogil=True)
def _least_squares(weights, indices, centroids, group, scale):
    for r in range(weights.shape[0]):
        for g in range(scale.shape[1]):
            cross, square = 0.0, 0.0
            for c in range(g * group, min(weights.shape[1], (g + 1) * group)):
                weight = np.float64(weights[r, c])
                if weight == weight:
                    centroid = np.float64(centroids[indices[r, c]])
                    cross += weight * centroid
                    square += centroid * centroid
            if cross > 0:
                scale[r, g] = np.float32(cross / square)
