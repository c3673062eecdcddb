"""Indices that suit a calibration text, for given centroids, factors and exact weights. Knows no recipe.

Measured on a 135M model, K = 16, 0.1 % exact, divergence from the source: error-compensated 0.2272, and after three
passes of descent 0.2195. Choosing the exact weights by what each gains, instead of the largest: no better (0.2199).
Exact weights keep their own values: what massive activations pass through should not follow a sample.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rkf.cluster.assign import U8, middles
from rkf.cluster.compensate import Mask, Objective, compensated, descended
from rkf.format.matrix import F32

_PASSES = 2  # of descent; the third takes another 0.5 % off the output error


def suited(weights: F32, exact: Mask, centroids: F32, scale: F32, objective: Objective) -> U8:
    """The indices, u8[rows, cols].

    weights: f32[rows, cols]; exact: bool[rows, cols], weights that are not clustered; centroids: f32[k]; scale:
    f32[rows, 1] > 0.
    """
    turned, mask = _turned(weights / scale, objective), _turned(exact, objective)
    quantised = compensated(turned, objective, centroids, mask)
    quantised, _ = descended(turned, quantised, objective, centroids, mask, _PASSES)
    return np.searchsorted(middles(centroids), quantised[np.argsort(objective.order)].T).astype(np.uint8)


def _turned(values: NDArray, objective: Objective) -> NDArray:
    """[rows, cols] as [cols, rows], columns in the objective's order."""
    return np.ascontiguousarray(values.T[objective.order])
