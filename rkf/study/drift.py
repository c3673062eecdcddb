"""`drift`: replaces the values of more and more layers, order kept. Which breaks the model first, scale or ranks?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from rkf.file.container import open_file
from rkf.format.matrix import F32, ClusteredMatrix, MatrixValues, ascending
from rkf.study import trace
from rkf.study.changes import centring, matching
from rkf.study.charts import Chart, Row, only
from rkf.study.preserve import uniform
from rkf.study.subject import Subject, Trial, generator

ABOUT = """Layers get sorted uniform draws as values, one layer after another: from the first, from the last, in random
order. The corrections w' = a * w + b, a > 0, of each matrix are: none; mean (only b, which keeps the mean of the
clustered weights); moments (a and b, which keep mean and variance, in closed form from the counts); output (moments,
then an a that gives the matrix's output the root mean square of the unchanged model, on the unchanged model's inputs).
Once all layers are replaced, the residual stream of a stretch of the text is measured layer by layer. A change of its
scale shows drift; a low rank correlation with the unchanged model shows distortion. If a few layers already ruin the
model, only the trial with all layers follows."""

ORDERS = ("first", "last", "random")
CORRECTIONS = {"none": uniform, "mean": centring(uniform), "moments": matching(uniform), "output": matching(uniform)}
TOKENS = 128  # of the first window, for measuring the residual stream
BEARABLE = 2.0  # perplexity relative to the reference up to which a model counts as working
_LOST = 10.0  # perplexity above which further layers add no information


class StreamProbe:
    """The unchanged model's states on a stretch of text, and how others differ."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._ids = subject.probe.windows[0].ids[:TOKENS]
        self._inputs: dict[str, F32] = {}
        self._states: list[F32] = []

    def profile(self, values: Path) -> dict[str, Any]:
        """The residual stream under a values file compared with the unchanged one: "profile", by layer."""
        with open_file(self._subject.container.path, values=values) as changed:
            states = trace.residual_stream(changed, self._ids, threads=self._subject.probe.threads)
        return {"profile": trace.compared(states, self._unchanged())}

    def shrinkage(self, name: str, values: MatrixValues) -> float:
        """The factor on `values` that restores a matrix's output root mean square; exact weights are left out. 1 for
        stacks: each of their experts sees too few of the tokens.
        """
        self._unchanged()
        old = self._subject.container.load(name)
        if not isinstance(old, ClusteredMatrix) or name not in self._inputs:
            return 1.0
        matrices = [replace(old, centroids=each, exceptions=None) for each in (old.centroids, values.centroids)]
        before, after = (np.linalg.norm(self._inputs[name] @ matrix.decode().T) for matrix in matrices)
        return float(before / after) if after > 0 else 1.0

    def _unchanged(self) -> list[F32]:
        if not self._states:
            self._states = trace.residual_stream(
                self._subject.container,
                self._ids,
                threads=self._subject.probe.threads,
                seen=self._inputs.__setitem__,
            )
        return self._states


def trials(subject: Subject, seeds: int) -> Iterator[Trial]:
    """Every order and correction at 1, …, half of the layers; all layers once, because the order no longer matters."""
    stream = StreamProbe(subject)

    @cache
    def values(correction: str, layer: int, seed: int) -> dict[str, MatrixValues]:
        changed = subject.changed(subject.names([layer]), CORRECTIONS[correction], seed, ordered=True)
        if correction != "output":
            return changed
        return {name: _scaled(new, stream.shrinkage(name, new)) for name, new in changed.items()}

    def changed(correction: str, layers: tuple[int, ...], seed: int) -> dict[str, MatrixValues]:
        return {name: new for layer in layers for name, new in values(correction, layer, seed).items()}

    for seed, correction, order in product(range(seeds), CORRECTIONS, ORDERS):
        if seed and correction == "output":  # one seed is enough: its spread is that of moments
            continue
        for count in steps(len(subject.layers)):
            factors = {"order": order, "correction": correction, "replaced": count, "seed": seed}
            chosen = tuple(ordered(subject.layers, order, seed)[:count])
            new = partial(changed, correction, chosen, seed)
            if count < len(subject.layers):
                yield subject.trial_of(factors, new, ordered=True, pointless=partial(_clear, factors))
            elif order == ORDERS[0]:
                yield subject.trial_of(factors, new, ordered=True, also=stream.profile)


def _clear(factors: Row, rows: list[Row]) -> bool:
    """Whether fewer layers have already ruined the model."""
    same = only(rows, order=factors["order"], correction=factors["correction"], seed=factors["seed"])
    return any(row["replaced"] < factors["replaced"] and row["ppl_ratio"] > _LOST for row in same)


def steps(layers: int) -> list[int]:
    """1, …, a quarter, half and all of the layers."""
    found = [layers]
    while found[0] > 1:
        found.insert(0, found[0] // 2)
    return found


def ordered(layers: list[int], order: str, seed: int) -> list[int]:
    """The order in which layers are replaced."""
    if order == "random":
        return [int(layer) for layer in generator(seed, "order").permutation(layers)]
    return layers if order == "first" else layers[::-1]


def survivors(rows: list[Row]) -> list[Row]:
    """How many of the tried numbers of layers can be replaced before perplexity has doubled; 0 if not even one."""
    found = []
    for order in ORDERS:
        for correction in CORRECTIONS:
            for seed in sorted({row["seed"] for row in rows}):
                done = sorted(only(rows, order=order, correction=correction, seed=seed), key=_replaced)
                alive = 0
                for row in done:
                    if row["ppl_ratio"] > BEARABLE:
                        break
                    alive = row["replaced"]
                if done:
                    found.append({"order": order, "correction": correction, "seed": seed, "survive": alive})
    return found


def charts(rows: list[Row]) -> list[Chart]:
    most = max(row["replaced"] for row in rows)
    everywhere = [
        {**row, "order": order} for order in ORDERS for row in rows if row["replaced"] == most or row["order"] == order
    ]
    curves = [
        Chart(
            f"replaced-{order}",
            f"Layers replaced, order: {order}",
            only(everywhere, order=order),
            x="replaced",
            series="correction",
        )
        for order in ORDERS
    ]
    profiles = [
        {**row, "layer": layer, "scale": scale, "spearman": correlation}
        for row in only(rows, replaced=most)
        for layer, (scale, correlation) in enumerate(
            zip(row["profile"]["scale"], row["profile"]["spearman"], strict=True)
        )
    ]
    alive = Chart(
        "survivors",
        f"Layers replaced before perplexity is {BEARABLE:g} times the reference's",
        survivors(everywhere),
        x="order",
        series="correction",
        y="survive",
    )
    return [
        alive,
        *curves,
        Chart(
            "scale",
            "Scale of the residual stream, all layers replaced",
            profiles,
            x="layer",
            series="correction",
            y="scale",
        ),
        Chart(
            "ranks",
            "Ranks of the residual stream, all layers replaced",
            profiles,
            x="layer",
            series="correction",
            y="spearman",
        ),
    ]


def _scaled(values: MatrixValues, a: float) -> MatrixValues:
    return replace(values, centroids=np.stack([ascending(a * table.astype(np.float64)) for table in values.centroids]))


def _replaced(row: Row) -> int:
    return int(row["replaced"])
