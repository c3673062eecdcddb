"""`scramble`: permutes the centroids among the ranks. The values stay, their order is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.study.changes import F64, U64, Change, matching
from rkf.study.charts import Chart, Row, having, only
from rkf.study.subject import Subject, Trial

I64 = NDArray[np.int64]
Permutation = Callable[[int, np.random.Generator], I64]
"""(k, random) -> for each new rank, the old rank that gives it its value."""

ABOUT = """Each matrix keeps its ranks and its values, but the values are permuted among the ranks. Restored: an affine
map with a > 0 then restores the matrix's mean and variance, so the remaining damage is neither shift nor scale. swap-d:
ranks trade places in pairs d apart; within-b: blocks of b neighbouring ranks are shuffled inside; blocks-b: whole
blocks trade places; reverse: the first rank takes the last value."""


def whole(k: int, random: np.random.Generator) -> I64:
    """Any permutation."""
    return random.permutation(k)


def swap(distance: int, k: int, random: np.random.Generator) -> I64:
    """Disjoint pairs of ranks `distance` apart trade places; ranks without a partner stay."""
    ranks = np.arange(k)
    low = ranks[(ranks % (2 * distance) < distance) & (ranks + distance < k)]
    permutation = ranks.copy()
    permutation[low], permutation[low + distance] = low + distance, low
    return permutation


def reverse(k: int, random: np.random.Generator) -> I64:
    return np.arange(k)[::-1]


def within(block: int, k: int, random: np.random.Generator) -> I64:
    """A shuffle inside each block of neighbouring ranks."""
    return np.concatenate([start + random.permutation(min(block, k - start)) for start in range(0, k, block)])


def blocks(block: int, k: int, random: np.random.Generator) -> I64:
    """A shuffle of whole blocks of neighbouring ranks."""
    parts = [np.arange(start, min(start + block, k)) for start in range(0, k, block)]
    return np.concatenate([parts[i] for i in random.permutation(len(parts))])


PARTIAL: dict[str, Permutation] = {
    **{f"swap-{d}": partial(swap, d) for d in (1, 2, 4, 8)},
    "reverse": reverse,
    **{f"within-{b}": partial(within, b) for b in (2, 4, 8)},
    **{f"blocks-{b}": partial(blocks, b) for b in (4, 8)},
}
_FIXED = [name for name in PARTIAL if name.startswith(("swap", "reverse"))]  # these are not random


def permuting(permutation: Permutation) -> Change:
    """The change that permutes values among the ranks."""

    def change(centroids: F64, counts: U64, random: np.random.Generator) -> F64:
        return centroids[permutation(len(centroids), random)]

    return change


def trials(subject: Subject, seeds: int) -> Iterator[Trial]:
    """All layers, whole and partial permutations; then single layers; then each kind of matrix, one seed (it differs by
    powers of ten).
    """
    for name in _FIXED:
        yield _trial(subject, name, PARTIAL[name])
    for layer in subject.spread:
        yield _trial(subject, "swap-1", PARTIAL["swap-1"], layer=layer)
    for seed in range(seeds):
        for name, permutation in {"whole": whole, **PARTIAL}.items():
            if name not in _FIXED:
                yield _trial(subject, name, permutation, seed=seed)
        for layer in subject.spread:
            yield _trial(subject, "whole", whole, layer=layer, seed=seed)
    yield _trial(subject, "whole", whole, restored=False, seed=0)
    for kind in subject.kinds:
        yield _trial(subject, "whole", whole, kind=kind, seed=0)


def _trial(
    subject: Subject,
    name: str,
    permutation: Permutation,
    *,
    seed: int | None = None,
    restored: bool = True,
    layer: int | None = None,
    kind: str | None = None,
) -> Trial:
    factors: dict[str, Any] = {"change": name, "restored": restored, "kind": kind, "layer": layer, "seed": seed}
    change = permuting(permutation)
    names = subject.names(None if layer is None else [layer], kind)
    return subject.trial(factors, names, matching(change) if restored else change, ordered=False)


def charts(rows: list[Row]) -> list[Chart]:
    everywhere = only(rows, kind=None, layer=None)
    return [
        Chart("whole", "All layers, whole permutation", only(everywhere, change="whole"), x="restored"),
        Chart("partial", "All layers, partial permutations", only(everywhere, restored=True), x="change"),
        Chart("kinds", "One kind of matrix in all layers, whole permutation", having(rows, "kind"), x="kind"),
        Chart("layers", "One layer alone", having(rows, "layer"), x="layer", series="change"),
    ]
