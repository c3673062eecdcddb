"""Second moments of matrices' inputs on a text, one stretch of a program at a time. Knows no clustering."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
SHRINKAGE = 0.5
# x^T x of 8,960 columns and 1,024 tokens takes 1.8 s in one product, of which 1.4 s are a copy of one triangle to the
# other, and .3 to 1.3 s more to add in f64. In blocks of rows on and above the diagonal it takes .7 s in all.
_BLOCK = 512  # rows of a block
_TOGETHER = 4096  # tokens whose inputs are in memory and multiplied at once


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
        tokens = sum(seen.tokens for seen in self._inputs[expert])
        return _shrunk(np.asarray(total, np.float64) / tokens, tokens)


Moments = F64 | StackMoments
"""E[x^T x] of a matrix, f64[cols, cols], or of each matrix of a stack."""


class _Mean:
    """E[x^T x] over the tokens added so far: f64[cols, cols], of which only the upper blocks are computed."""

    def __init__(self, columns: int) -> None:
        self._sum = np.zeros((columns, columns))
        self._tokens = 0

    def add(self, pool: ThreadPoolExecutor, x: F32) -> None:
        """x: f32[tokens, cols]"""
        self._tokens += len(x)

        def block(start: int) -> None:
            rows = slice(start, start + _BLOCK)
            self._sum[rows, start:] += x[:, rows].T @ x[:, start:]

        list(pool.map(block, range(0, len(self._sum), _BLOCK)))

    def finished(self, pool: ThreadPoolExecutor) -> F64:
        """The whole mean, shrunk; nothing can be added afterwards."""
        found = self._sum

        def block(start: int) -> None:
            rows, end = slice(start, start + _BLOCK), start + _BLOCK
            found[rows, start:] /= self._tokens
            found[rows, rows] = np.triu(found[rows, rows]) + np.triu(found[rows, rows], 1).T
            found[end:, rows] = found[rows, end:].T

        list(pool.map(block, range(0, len(found), _BLOCK)))
        return _shrunk(found, self._tokens)


def _shrunk(mean: F64, tokens: int) -> F64:
    """The mean of x^T x over some tokens, with a share of its trace added to the diagonal, in place: the fewer tokens,
    the less the mean says about other text.
    """
    diagonal = np.einsum("ii->i", mean)
    diagonal += SHRINKAGE / tokens * diagonal.sum()
    return mean


def tapped(
    pool: ThreadPoolExecutor, stretch: Stretch, weights: Mapping[str, F32], flows: Sequence[Flow]
) -> tuple[list[Flow], dict[str, Moments]]:
    """The flows after a stretch, and the second moments of its matrices' inputs over all flows, by full name."""
    after: list[Flow] = []
    means: dict[str, _Mean] = {}
    stacks: dict[str, StackMoments] = {}
    for group in _groups(flows):
        inputs: dict[str, list[F32]] = {}
        for flow, taps in pool.map(partial(_seen, stretch, weights), group):
            after.append(flow)
            for seen in taps:
                name = seen.names[0]
                if seen.expert is None:
                    inputs.setdefault(name, []).append(seen.x)
                else:
                    stacks.setdefault(name, StackMoments(len(weights[name]))).add(seen, seen.expert)
        for name, parts in inputs.items():
            means.setdefault(name, _Mean(parts[0].shape[1])).add(pool, np.concatenate(parts))
    found: Mapping[str, Moments] = {**{name: mean.finished(pool) for name, mean in means.items()}, **stacks}
    return after, {name: found[first] for first, names in stretch.matrices.items() for name in names}


def _groups(flows: Sequence[Flow]) -> Iterator[list[Flow]]:
    """The flows in groups of _TOGETHER tokens, or of one flow that has more."""
    group: list[Flow] = []
    tokens = 0
    for flow in flows:
        if group and tokens + flow.ids.size > _TOGETHER:
            yield group
            group, tokens = [], 0
        group.append(flow)
        tokens += flow.ids.size
    yield group


def _seen(stretch: Stretch, weights: Mapping[str, F32], flow: Flow) -> tuple[Flow, list[Seen]]:
    """The flow after the stretch, and the inputs of its matrices and stacks."""
    taps: list[Seen] = []
    return stretch(weights, flow, None, taps.append), taps
