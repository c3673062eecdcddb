"""Error-compensated assignment: each weight's centroid also corrects the error of the weights before it.

Minimises, row by row, (w - q) H (w - q)^T, where H is the second moments of the layer's inputs: the squared error of
the layer's outputs on the calibration text. Knows no fitting of centroids. Arrays are transposed, [cols, rows], so that
a kernel's inner loop runs over rows, which are independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rkf.cluster.assign import middles
from rkf.cluster.factor import factorise
from rkf.format.matrix import F32
from rkf.numbers.eight_bits import BLOCK, Rounded, rounded_product

Mask = NDArray[np.bool_]
DAMPING = 0.01  # share of the mean diagonal, as in GPTQ
_MOST_COLUMNS = 16  # for each token; an expert that saw fewer tokens is clustered without data
PASSES = 2  # of descent; a third lowers the output error by another 0.5 %
_BLOCK = 64  # columns between two matrix products within a panel; 32 and 128 are slower
# Columns whose products with all others are made at once: a product of 64 rows reaches 60 GFLOPS, of 512 rows 100. A
# multiple of the eight-bit block.
_PANEL = 512
_ROWS = 256  # rows processed together: a block of them stays in the second-level cache


@dataclass(frozen=True, slots=True)
class Objective:
    """The damped second moments of a layer's inputs, prepared for the solvers.

    order: i64[cols], columns by falling second moment. moments: f32[cols, cols], in that order. feedback: f32[cols,
    cols], unit upper triangular, moments = feedback * diag(d) * feedback^T. passes: of descent, after compensation.
    """

    order: NDArray[np.int64]
    moments: F32
    feedback: F32
    passes: int = PASSES

    @classmethod
    def of(cls, moments: NDArray[np.floating], damping: float, passes: int = PASSES) -> Objective:
        """moments: [cols, cols]; damping: the share of their mean diagonal that is added to the diagonal.

        With damping, a column that the calibration text never uses still takes its nearest centroid, and f32 is enough
        for the factor: no eigenvalue is below the damping, or above the sum of the diagonal.
        """
        diagonal = np.diagonal(moments).astype(np.float64)
        diagonal += damping * diagonal.mean() or 1.0
        order = np.argsort(-diagonal, kind="stable")
        rising = order[::-1]  # in this order the lower factor is the upper one of the falling order
        work = moments.take(rising, 0).take(rising, 1).astype(np.float32, copy=False)  # np.ix_ takes twice the time
        np.einsum("ii->i", work)[:] = diagonal[rising]
        damped = work[::-1, ::-1].copy()
        factorise(work)
        work /= np.diagonal(work).copy()
        return cls(order, damped, work[::-1, ::-1].copy(), passes)


class ExpertMoments(Protocol):
    """The second moments of the inputs of each matrix of a stack."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many tokens each matrix saw."""
        ...

    def of(self, expert: int) -> F32:
        """E[x^T x] of the inputs of one that saw some, f32[cols, cols]."""
        ...


Moments = F32 | ExpertMoments
"""E[x^T x] of a matrix, f32[cols, cols], or of each matrix of a stack."""
Objectives = Objective | Callable[[int], Objective | None]
"""Of a matrix, or of each matrix of a stack by its number: None for one without."""


def objectives(moments: Moments, passes: int = PASSES) -> Objectives:
    """What indices should suit. Those of a stack are made when asked for: None for an expert with too few tokens."""
    if isinstance(moments, np.ndarray):
        return Objective.of(moments, DAMPING, passes)
    counts = moments.counts

    def of(expert: int) -> Objective | None:
        if not counts[expert]:
            return None
        found = moments.of(expert)
        return Objective.of(found, DAMPING, passes) if len(found) <= _MOST_COLUMNS * counts[expert] else None

    return of


def compensated(weights: F32, objective: Objective, centroids: F32, exact: Mask) -> F32:
    """Quantised weights, f32[cols, rows]: GPTQ (Frantar et al. 2022) in the form of LDLQ (Chee et al. 2023).

    weights: f32[cols, rows], columns in the objective's order; centroids: f32[k], ascending; exact: bool[cols, rows],
    the weights that stay exact.
    """
    columns = weights.shape[0]
    quantised, error = np.empty_like(weights), np.empty_like(weights)
    middle = middles(centroids)
    for panel in _parts(0, columns, _PANEL):
        target = weights[panel] + objective.feedback[: panel.start, panel].T @ error[: panel.start]
        for block in _parts(panel.start, panel.stop, _BLOCK):
            before, own = slice(panel.start, block.start), slice(block.start - panel.start, block.stop - panel.start)
            wanted = target[own] + objective.feedback[before, block].T @ error[before]
            feedback = np.ascontiguousarray(objective.feedback[block, block])
            each = weights[block], wanted, feedback, centroids, middle, exact[block], quantised[block], error[block]
            _compensate(*each)
    return quantised


def _parts(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def descended(weights: F32, quantised: F32, objective: Objective, centroids: F32, exact: Mask, passes: int) -> F32:
    """Coordinate descent from `quantised`: each weight in turn moves to the best centroid given all others. Returns the
    quantised weights, f32[cols, rows].

    The gradient H (w - q) is made where it is needed; keeping all of it up to date takes half as much again. It is made
    in eight bits: the error of outputs ends 0.1 % higher than with f32, where a third pass lowers it by 0.5 %.
    """
    quantised = quantised.copy()
    error = weights - quantised
    middle = middles(centroids)
    panels = _parts(0, len(weights), _PANEL)
    moments = [Rounded.of(objective.moments[panel]) for panel in panels]
    errors = Rounded.of(error.T).panels()
    for _ in range(passes):
        changed = 0
        for panel, rounded in zip(panels, moments, strict=True):
            gradient = rounded_product(rounded, errors)
            steps = np.zeros_like(error[panel])
            for block in _parts(panel.start, panel.stop, _BLOCK):
                own = slice(block.start - panel.start, block.stop - panel.start)
                before = slice(panel.start, block.start)
                left = gradient[own] - objective.moments[block, before] @ steps[: own.start]
                within = np.ascontiguousarray(objective.moments[block, block])
                changed += _descend(left, within, centroids, middle, exact[block], quantised[block], steps[own])
            error[panel] -= steps
            errors.replace(panel.start // BLOCK, Rounded.of(error[panel].T).panels())
        if not changed:
            break
    return quantised


@njit(cache=True, nogil=True)
def _nearest_row(target, centroids, middle, below, out):
    n = target.size
    for i in range(n):
        below[i] = 0
    for m in range(middle.size):
        edge = middle[m]
        for i in range(n):
            below[i] += np.uint8(target[i] > edge)
    for i in range(n):
        out[i] = centroids[below[i]]


@njit(cache=True, nogil=True, fastmath={"contract"})
def _compensate(weights, target, feedback, centroids, middle, exact, quantised, error):
    columns, rows = weights.shape
    below = np.empty(_ROWS, np.uint8)
    for first in range(0, rows, _ROWS):
        last = min(first + _ROWS, rows)
        for c in range(columns):
            wanted = target[c, first:last]
            for before in range(c):
                factor = feedback[before, c]
                left = error[before, first:last]
                for i in range(wanted.size):
                    wanted[i] += factor * left[i]
            got = quantised[c, first:last]
            _nearest_row(wanted, centroids, middle, below[: wanted.size], got)
            for i in range(wanted.size):
                if exact[c, first + i]:
                    got[i] = weights[c, first + i]
                error[c, first + i] = weights[c, first + i] - got[i]


@njit(cache=True, nogil=True, fastmath={"contract"})
def _descend(gradient, moments, centroids, middle, exact, quantised, step):
    columns, rows = gradient.shape
    below = np.empty(_ROWS, np.uint8)
    wanted = np.empty(_ROWS, np.float32)
    best = np.empty(_ROWS, np.float32)
    local = np.empty((columns, _ROWS), np.float32)
    changed = 0
    for first in range(0, rows, _ROWS):
        n = min(first + _ROWS, rows) - first
        for c in range(columns):
            for i in range(n):
                local[c, i] = gradient[c, first + i]
        for c in range(columns):
            inverse = np.float32(1) / moments[c, c]
            for before in range(c):
                factor = moments[before, c]
                for i in range(n):
                    local[c, i] -= factor * step[before, first + i]
            for i in range(n):
                wanted[i] = quantised[c, first + i] + local[c, i] * inverse
            _nearest_row(wanted[:n], centroids, middle, below[:n], best[:n])
            for i in range(n):
                value = quantised[c, first + i] if exact[c, first + i] else best[i]
                changed += value != quantised[c, first + i]
                step[c, first + i] = value - quantised[c, first + i]
                quantised[c, first + i] = value
    return changed
