"""The model under study: its clustered matrices by layer and role, and the effect of other values on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from rkf.errors import UsageError
from rkf.eval.divergence import divergence
from rkf.eval.reference import Window
from rkf.file.container import Container
from rkf.file.values import write_values
from rkf.format.matrix import MatrixValues, ascending
from rkf.model.program import layer_of
from rkf.model.roles import roles
from rkf.runtime.model import load
from rkf.study.changes import Change, compared
from rkf.study.charts import Row

_SPREAD = 8  # maximum number of layers for trials of one layer
_KEPT = ("ppl", "ppl_ratio", "ppl_ratio_stderr", "kld", "kld_stderr", "top1", "top1_stderr")


@dataclass(frozen=True, slots=True)
class Trial:
    """One changed model. factors: describe it, by the columns of its study; None where one does not apply.

    measure: makes it and returns its results. pointless: whether earlier rows make it unnecessary.
    """

    factors: Mapping[str, Any]
    measure: Callable[[], Mapping[str, Any]]
    pointless: Callable[[list[Row]], bool] = lambda rows: False

    @property
    def name(self) -> str:
        """Unique within a study; part of a file name."""
        return "_".join(f"{key}-{value}" for key, value in self.factors.items() if value is not None)


@dataclass(frozen=True, slots=True)
class Probe:
    """Measures models against the windows of a reference."""

    windows: list[Window]
    threads: int | None = None

    def __call__(self, model: Path, values: Path | None = None) -> dict[str, float]:
        with load(model, threads=self.threads, values=values) as ready:
            figures = divergence(ready, self.windows)
        return {key: float(figures[key]) for key in _KEPT}


@dataclass(frozen=True)
class Subject:
    """container: the open model; folder: for values files; layers: those that the study may change."""

    container: Container
    folder: Path
    layers: list[int]
    probe: Probe

    def names(self, layers: Iterable[int] | None = None, kind: str | None = None) -> list[str]:
        """Clustered matrices of some of the study's layers (kind: a role, such as "query"), in name order."""
        wanted = set(self.layers if layers is None else layers)
        return [
            name
            for name, (layer, found) in clustered_in_layers(self.container).items()
            if layer in wanted and kind in (None, found)
        ]

    @property
    def kinds(self) -> list[str]:
        """Kinds of matrices, in the order of the first layer's names."""
        return list(dict.fromkeys(kind for _, kind in clustered_in_layers(self.container).values()))

    @property
    def spread(self) -> list[int]:
        """Evenly spaced layers of the study, for trials of one layer that need not cover all."""
        return self.layers[:: -(-len(self.layers) // _SPREAD)]

    def changed(self, names: Iterable[str], change: Change, seed: int, ordered: bool) -> dict[str, MatrixValues]:
        """New values of some matrices. Each table is changed by itself; factors and exact weights stay.

        A matrix's randomness depends only on the seed and its name, not on the other matrices that change.
        """
        replacements = {}
        for name in names:
            old, counts, random = self.container.values(name), self.container.counts(name), generator(seed, name)
            tables = zip(old.centroids.astype(np.float64), counts, strict=True)
            new = [change(centroids, table, random) for centroids, table in tables]
            stored = np.stack([ascending(values) if ordered else values.astype(np.float32) for values in new])
            replacements[name] = replace(old, centroids=stored)
        return replacements

    def trial(self, factors: Mapping[str, Any], names: list[str], change: Change, *, ordered: bool) -> Trial:
        """The trial of one change on some matrices; factors["seed"] seeds it (None: not random)."""
        seed = factors["seed"] or 0
        return self.trial_of(factors, lambda: self.changed(names, change, seed, ordered), ordered=ordered)

    def trial_of(
        self,
        factors: Mapping[str, Any],
        values: Callable[[], Mapping[str, MatrixValues]],
        *,
        ordered: bool,
        also: Callable[[Path], Mapping[str, Any]] = lambda path: {},
        pointless: Callable[[list[Row]], bool] = lambda rows: False,
    ) -> Trial:
        """A trial of new values. also: returns further results from a values file."""

        def measure() -> dict[str, Any]:
            path = self.folder / f"{trial.name}.rkv"
            replacements = values()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_values(
                path, self.container, replacements, ordered=ordered, provenance={"study": trial.name}, force=True
            )
            return {**self.probe(self.container.path, path), **self._moved(replacements), **also(path)}

        trial = Trial(factors, measure, pointless)
        return trial

    def _moved(self, replacements: Mapping[str, MatrixValues]) -> dict[str, float]:
        """How far the weights of the changed matrices moved, averaged over the tables."""
        found = [
            compared(new.astype(np.float64), old.astype(np.float64), counts)
            for name, values in replacements.items()
            for new, old, counts in zip(
                values.centroids, self.container.values(name).centroids, self.container.counts(name), strict=True
            )
        ]
        error, correlation = np.mean(found, axis=0)
        return {"error": float(error), "correlation": float(correlation)}


def clustered_in_layers(container: Container) -> dict[str, tuple[int, str]]:
    """Clustered matrices and stacks of the layers: name -> (layer, role)."""
    if container.model is None:
        raise UsageError(f"{container.path}: expected a whole model, got a file without one")
    found = roles(container.model.program)
    clustered = [(name, layer_of(name)) for name, entry in container.tensors.items() if entry.clusters]
    return {name: (layer, found.get(name, "other")) for name, layer in clustered if layer is not None}


def chosen_layers(container: Container, wanted: Iterable[int] | None) -> list[int]:
    """The layers that have clustered matrices, or the wanted ones of them; UsageError for any other layer."""
    there = sorted({layer for layer, _ in clustered_in_layers(container).values()})
    if not there:
        raise UsageError(f"{container.path}: no layer has a clustered matrix, so there is nothing to study")
    chosen = there if wanted is None else sorted(set(wanted))
    if not chosen or not set(chosen) <= set(there):
        raise UsageError(f"layers: expected some of {there[0]} to {there[-1]}, got {chosen}")
    return chosen


def generator(seed: int, name: str) -> np.random.Generator:
    """The randomness of one matrix in one trial."""
    digest = blake3(f"{seed} {name}".encode()).digest(length=16)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
