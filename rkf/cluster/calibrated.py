"""Indices and exact weights that suit a calibration text, for given centroids and factors. Knows no recipe.

Measured on a 135M model, K = 16, 0.1 % exact, divergence from the source: error-compensated 0.2272, and after three
passes of descent 0.2195. Freeing weights by what each would gain, instead of the largest: no better (0.2199).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rkf.cluster.assign import U8, middles
from rkf.cluster.compensate import Mask, Objective, compensated, descended
from rkf.matrix import F32

_PASSES = 2  # of descent; the third takes another 0.5 % off the output error
_ROWS = 4096  # rows worked on at a time: what bounds the memory


def suited(weights: F32, free: Mask, centroids: F32, scale: F32, objective: Objective) -> tuple[U8, F32]:
    """The indices, u8[rows, cols], and the weights with those that are free moved to where they serve best.

    weights: f32[rows, cols]; free: bool[rows, cols]; centroids: f32[k]; scale: f32[rows, 1] > 0.
    """
    indices, moved = np.empty(weights.shape, np.uint8), weights.copy()
    for start in range(0, len(weights), _ROWS):
        rows = slice(start, start + _ROWS)
        turned = _turned(weights[rows] / scale[rows], objective)
        mask = _turned(free[rows], objective)
        quantised = compensated(turned, objective, centroids, mask)
        quantised, _ = descended(turned, quantised, objective, centroids, mask, _PASSES)
        back = quantised[np.argsort(objective.order)].T
        indices[rows] = np.searchsorted(middles(centroids), back)
        moved[rows] = np.where(free[rows], back * scale[rows], weights[rows])
    return indices, moved


def _turned(values: NDArray, objective: Objective) -> NDArray:
    """[rows, cols] as [cols, rows], columns in the objective's order."""
    return np.ascontiguousarray(values.T[objective.order])
