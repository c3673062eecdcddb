"""Second moments of matrices' inputs on a text, one stretch of a program at a time. Knows no clustering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rkf.calibrate.interpreter import F32, Flow, Seen, Stretch

F64 = NDArray[np.float64]


class StackMoments:
    """Second moments for each matrix of a stack, computed on demand: all 128 of a 30B mixture's layer take 2 GB."""

    def __init__(self, experts: int) -> None:
        self._inputs: list[list[Seen]] = [[] for _ in range(experts)]

    def add(self, seen: Seen, expert: int) -> None:
        self._inputs[expert].append(seen)

    @property
    def counts(self) -> NDArray[np.int64]:
        """The number of tokens that each expert saw."""
        return np.array([sum(seen.tokens for seen in inputs) for inputs in self._inputs])

    def of(self, expert: int) -> F64:
        """E[x^T x] over the tokens of one expert that saw some, f64[cols, cols]."""
        total = sum(inputs.T @ inputs for inputs in (seen.inputs() for seen in self._inputs[expert]))
        return np.asarray(total, np.float64) / sum(seen.tokens for seen in self._inputs[expert])


Moments = F64 | StackMoments
"""E[x^T x] of a matrix, f64[cols, cols], or of each matrix of a stack."""


def tapped(
    pool: ThreadPoolExecutor, stretch: Stretch, weights: Mapping[str, F32], flows: Sequence[Flow]
) -> tuple[list[Flow], dict[str, Moments]]:
    """The flows after a stretch, and the second moments of its matrices' inputs over all flows, by full name."""
    count = sum(flow.ids.size for flow in flows)
    after: list[Flow] = []
    means: dict[str, F64] = {}
    stacks: dict[str, StackMoments] = {}
    for flow, squares, inputs in pool.map(partial(_seen, stretch, weights), flows):  # large: added one by one
        after.append(flow)
        for name, each in squares.items():
            means[name] = means.get(name, 0) + each / np.float64(count)
        for seen, expert in inputs:
            name = seen.names[0]
            stacks.setdefault(name, StackMoments(len(weights[name]))).add(seen, expert)
    found: Mapping[str, Moments] = {**means, **stacks}
    return after, {name: found[first] for first, names in stretch.matrices.items() for name in names}


def _seen(
    stretch: Stretch, weights: Mapping[str, F32], flow: Flow
) -> tuple[Flow, dict[str, F32], list[tuple[Seen, int]]]:
    """The flow after the stretch; x^T x of its matrices' inputs, by the first name that shares an input; and the inputs
    of its stacks.
    """
    squares: dict[str, F32] = {}
    inputs: list[tuple[Seen, int]] = []

    def tap(seen: Seen) -> None:
        if seen.expert is None:
            squares[seen.names[0]] = seen.x.T @ seen.x
        else:
            inputs.append((seen, seen.expert))

    return stretch(weights, flow, None, tap), squares, inputs
