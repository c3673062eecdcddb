"""`interpolate`: the straight path from a model's values to changed ones, and the point where the model breaks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rkf.study.changes import F64, U64, Change, matching
from rkf.study.charts import Chart, Row
from rkf.study.preserve import gaussian, ranks
from rkf.study.scramble import permuting, reverse, swap, whole
from rkf.study.subject import Subject, Trial

ABOUT = """(1 - t) * values + t * changed values in all layers; mean and variance are matched at every t. On the way to
sorted Gaussian draws and to evenly spaced ranks, every point keeps the order. On the way to permutations, the order
breaks where the first two ranks meet: with even spacing, an eighth of the way to swap-4 and half of the way to
reverse."""

STEPS = 5
ENDS: dict[str, tuple[Change, bool, bool]] = {  # name -> change, random?, order kept?
    "gaussian": (gaussian, True, True),
    "ranks": (ranks, False, True),
    "swap-4": (permuting(lambda k, random: swap(4, k, random)), False, False),
    "reverse": (permuting(reverse), False, False),
    "whole": (permuting(whole), True, False),
}


def path(end: Change, t: float) -> Change:
    """The change at point t of the straight path to another change."""

    def change(centroids: F64, counts: U64, random: np.random.Generator) -> F64:
        return (1 - t) * centroids + t * end(centroids, counts, random)

    return matching(change)


def trials(subject: Subject, seeds: int) -> Iterator[Trial]:
    for seed in range(seeds):
        for name, (end, is_random, ordered) in ENDS.items():
            for step in range(1, STEPS + 1):
                factors = {"towards": name, "t": step / STEPS, "seed": seed if is_random else None}
                if is_random or seed == 0:
                    yield subject.trial(factors, subject.names(), path(end, step / STEPS), ordered=ordered)


def charts(rows: list[Row]) -> list[Chart]:
    return [
        Chart("path", "Perplexity along the path", rows, x="t", series="towards"),
        Chart("divergence", "Divergence along the path", rows, x="t", series="towards", y="kld"),
        Chart("distance", "Divergence by how far the weights moved", rows, x="error", series="towards", y="kld"),
    ]
