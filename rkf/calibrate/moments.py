"""Second moments of matrices' inputs on a text, one stretch of a program at a time. Knows no clustering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rkf.calibrate.interpreter import F32, Flow, Seen, Stretch

F64 = NDArray[np.float64]

# Times columns / tokens: the share of the mean diagonal that is added to the diagonal. Output error on other tokens,
# relative to clustering without data, of gate and down in one layer of a 135M model at K = 16:
#   tokens / columns        1/64  1/16   1/4     1     4
#   with this shrinkage      .91   .76   .64   .56   .50 (gate)    .93   .86   .70   .63   .58 (down)
#   without                        .98  1.08   .98   .55 (gate)         1.10  1.18  1.21   .66 (down)
# 1 is as good as .5.
_SHRINKAGE = 0.5


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
        """E[x^T x] as the tokens of one expert that saw some tell it, f64[cols, cols]."""
        total = sum(inputs.T @ inputs for inputs in (seen.inputs() for seen in self._inputs[expert]))
        count = sum(seen.tokens for seen in self._inputs[expert])
        return _shrunk(np.asarray(total, np.float64) / count, count)


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
    found: Mapping[str, Moments] = {**{name: _shrunk(mean, count) for name, mean in means.items()}, **stacks}
    return after, {name: found[first] for first, names in stretch.matrices.items() for name in names}


def _shrunk(mean: F64, tokens: int) -> F64:
    """The mean of x^T x over some tokens, with a share of its trace added to the diagonal, in place: the fewer tokens,
    the less the mean says about other text.
    """
    diagonal = np.einsum("ii->i", mean)
    diagonal += _SHRINKAGE / tokens * diagonal.sum()
    return mean


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
