"""The factor a > 0 of each row or group of columns, by least squares for fixed ranks. Knows no k-means.

There is no offset b: it would take as many bytes as a second factor and an addition in every kernel, for rows whose
mean is almost 0. Row factors are optional, not the default: at K = 16 they lower the squared error by 2 to 18 % but
double the loss in queries, keys and gates, whose large rows matter most (docs/log.md).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from rkf.cluster.assign import U8
from rkf.cluster.recipe import Rule
from rkf.format.constants import DTYPE_BYTES
from rkf.format.matrix import F32, Affine

# A row of zeros would get a factor of 0, which the format does not allow. It gets the smallest factor of its dtype
# instead; the f32 minimum is large enough that no division overflows.
_LEAST = {"f16": np.float32(2.0**-24), "f32": np.float32(2.0**-100)}
_MOST = {"f16": np.float32(65504), "f32": np.float32(2.0**100)}
_LEAST_MEDIAN = np.float32(2.0**-17)


def first_guess(weights: F32, group: int) -> F32:
    """The root mean square of each group of columns, f32[rows, groups] > 0.

    weights: f32[rows, cols]; NaN weights are left out.
    """
    scale = np.empty((weights.shape[0], -(-weights.shape[1] // group)), np.float32)
    _root_mean_square(weights, group, scale)
    return np.clip(scale, _LEAST["f32"], _MOST["f32"])


def least_squares(weights: F32, indices: U8, centroids: F32, scale: F32, group: int) -> F32:
    """The factors of least squared error for given ranks, f32[rows, groups]; `scale` where they are not above 0."""
    fitted = scale.copy()
    _least_squares(weights, indices, centroids, group, fitted)
    return fitted


def rounded(scale: F32, dtype: str) -> F32:
    """Factors as they will be stored: in `dtype`, or in f32 where f16 is not sufficient."""
    held = _storage(scale, dtype)
    return np.clip(scale, _LEAST[held], _MOST[held]).astype(f"<f{DTYPE_BYTES[held]}").astype(np.float32)


def stored(scale: F32, rule: Rule, one_table: bool) -> Affine | None:
    """The factors `scale: f32[rows, groups]` as the format stores them; None if the rule has none.

    One factor for the whole tensor is f32. With several tables, each table's factor is repeated for all its rows.
    """
    if rule.affine == "none":
        return None
    if rule.affine == "tensor":
        return Affine("tensor", None, scale[0]) if one_table else Affine("row", None, scale[:, 0])
    values = scale.astype(f"<f{DTYPE_BYTES[_storage(scale, rule.affine_dtype)]}")
    return Affine("row", None, values[:, 0]) if rule.affine == "row" else Affine("group", rule.group, values)


def _storage(scale: F32, wanted: str) -> str:
    """f16 if it is wanted and holds the factors: none above its range, and half of them exact to 2^-8.

    A row eight times smaller than the median is then exact to 3 %. Integer centroids have factors around 2^-11, so that
    only near-empty rows are less exact, and the size of a file does not depend on them.
    """
    small = np.median(scale) < _LEAST_MEDIAN
    return "f16" if wanted == "f16" and scale.max() <= _MOST["f16"] and not small else "f32"


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
