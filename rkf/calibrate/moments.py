"""Second moments of matrices' inputs on a text, one stretch of a program at a time. Knows no clustering."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations_with_replacement
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from rkf.calibrate.interpreter import F32, Flow, Seen, Stretch, Weights
from rkf.numbers.eight_bits import Panels, Rounded, rounded_product

# Times columns / tokens: the share of the mean diagonal that is added to the diagonal. Output error on other tokens,
# relative to clustering without data, of gate and down in one layer of a 135M model at K = 16:
#   tokens / columns        1/64  1/16   1/4     1     4
#   with this shrinkage      .91   .76   .64   .56   .50 (gate)    .93   .86   .70   .63   .58 (down)
#   without                        .98  1.08   .98   .55 (gate)         1.10  1.18  1.21   .66 (down)
# 1 is as good as .5.
SHRINKAGE = 0.5
_BLOCK = 512  # columns of a block: only blocks on and above the diagonal are computed
_TOGETHER = 4096  # tokens whose inputs are in memory and multiplied at once
# Inputs are multiplied in eight bits with a scale for 128 tokens, and tokens that are louder than this many times the
# median in f32: the first token of a text may be a thousand times as loud as the others.
_LOUD = 4


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

    def of(self, expert: int) -> F32:
        """E[x^T x] as the tokens of one expert that saw some tell it, f32[cols, cols]."""
        products = (inputs.T @ inputs for inputs in (seen.inputs() for seen in self._inputs[expert]))
        total: F32 = np.asarray(sum(products), np.float32)
        tokens = sum(seen.tokens for seen in self._inputs[expert])
        return shrunk(total / np.float32(tokens), tokens)


class MomentsByMatrix(Protocol):
    """The second moments of the inputs of each matrix of a stack."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many tokens each matrix saw."""
        ...

    def of(self, expert: int) -> F32:
        """E[x^T x] of the inputs of one that saw some, f32[cols, cols]."""
        ...


Moments = F32 | MomentsByMatrix
"""E[x^T x] of a matrix, f32[cols, cols], or of each matrix of a stack."""


class _Mean:
    """E[x^T x] over the tokens added so far: f32[cols, cols], of which only the upper blocks are computed."""

    def __init__(self, columns: int) -> None:
        self._sum = np.zeros((columns, columns), np.float32)
        self._tokens = 0

    def add(self, pool: ThreadPoolExecutor, parts: Sequence[F32]) -> None:
        """parts: f32[tokens, cols], in pieces"""
        sizes = np.concatenate([np.einsum("ij,ij->i", x, x) for x in parts])
        loud = sizes > _LOUD**2 * np.median(sizes)
        ends = np.cumsum([len(x) for x in parts])
        aside = np.concatenate([x[each] for x, each in zip(parts, np.split(loud, ends[:-1]), strict=True)])
        self._tokens += len(loud)
        blocks = [slice(start, start + _BLOCK) for start in range(0, len(self._sum), _BLOCK)]

        def rounded(block: slice) -> tuple[Rounded, Panels]:
            turned = np.empty((min(_BLOCK, len(self._sum) - block.start), len(loud)), np.float32)
            for x, end in zip(parts, ends, strict=True):
                turned[:, end - len(x) : end] = x[:, block].T
            turned[:, loud] = 0
            found = Rounded.of(turned)
            return found, found.panels()

        made = list(pool.map(rounded, blocks))

        def multiply(pair: tuple[int, int]) -> None:
            left, right = pair
            rows, columns = blocks[left], blocks[right]
            self._sum[rows, columns] += rounded_product(made[left][0], made[right][1])
            self._sum[rows, columns] += aside[:, rows].T @ aside[:, columns]

        list(pool.map(multiply, combinations_with_replacement(range(len(blocks)), 2)))

    def finished(self, pool: ThreadPoolExecutor) -> F32:
        """The whole mean, shrunk; nothing can be added afterwards."""
        found = self._sum

        def block(start: int) -> None:
            rows, end = slice(start, start + _BLOCK), start + _BLOCK
            found[rows, start:] /= self._tokens
            found[rows, rows] = np.triu(found[rows, rows]) + np.triu(found[rows, rows], 1).T
            found[end:, rows] = found[rows, end:].T

        list(pool.map(block, range(0, len(found), _BLOCK)))
        return shrunk(found, self._tokens)


def shrunk(mean: F32, tokens: int) -> F32:
    """The mean of x^T x over some tokens, with a share of its trace added to the diagonal, in place: the fewer tokens,
    the less the mean says about other text.
    """
    diagonal = np.einsum("ii->i", mean)
    diagonal += np.float32(SHRINKAGE / tokens) * diagonal.sum()
    return mean


def tapped(
    pool: ThreadPoolExecutor,
    stretch: Stretch,
    weights: Weights,
    flows: Sequence[Flow],
    wanted: Collection[str] | None = None,
) -> tuple[list[Flow], dict[str, Moments]]:
    """The flows after a stretch, and the second moments of its matrices' inputs over all flows, by full name.

    wanted: the matrices whose moments are needed, by default all.
    """
    groups = {
        first: names for first, names in stretch.matrices.items() if wanted is None or not set(names).isdisjoint(wanted)
    }
    after: list[Flow] = []
    means: dict[str, _Mean] = {}
    stacks: dict[str, StackMoments] = {}
    for group in _groups(flows):
        inputs: dict[str, list[F32]] = {}
        for flow, taps in pool.map(partial(_seen, stretch, weights, groups), group):
            after.append(flow)
            for seen in taps:
                name = seen.names[0]
                if seen.expert is None:
                    inputs.setdefault(name, []).append(seen.x)
                else:
                    experts = len(cast(Sequence[Any], weights[name]))
                    stacks.setdefault(name, StackMoments(experts)).add(seen, seen.expert)
        for name, parts in inputs.items():
            means.setdefault(name, _Mean(parts[0].shape[1])).add(pool, parts)
    found: Mapping[str, Moments] = {**{name: mean.finished(pool) for name, mean in means.items()}, **stacks}
    return after, {name: found[first] for first, names in groups.items() for name in names}


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


def _seen(stretch: Stretch, weights: Weights, wanted: Collection[str], flow: Flow) -> tuple[Flow, list[Seen]]:
    """The flow after the stretch, and the inputs whose first matrix or stack is wanted."""
    taps: list[Seen] = []

    def tap(seen: Seen) -> None:
        if seen.names[0] in wanted:
            taps.append(seen)

    return stretch(weights, flow, None, tap), taps
