"""`preserve`: other values for the same ranks, drawn at random or mapped monotonically. The order stays."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from rkf.study.changes import F64, U64, Change, matching, moments
from rkf.study.charts import Chart, Row, having, only
from rkf.study.subject import Subject, Trial

ABOUT = """Each matrix keeps its ranks. Their values are drawn at random in ascending order (uniform between the first
and the last centroid; Gaussian and Laplace with the mean and variance of the weights; log-uniform in magnitude), or
mapped monotonically from the old values (power-p: |c|^p with its sign; tanh), or replaced by the ranks themselves,
evenly spaced. Matched: an affine map with a > 0 then restores the matrix's mean and variance. early, middle, late: a
third of the layers each."""


def uniform(centroids: F64, counts: U64, random: np.random.Generator) -> F64:
    return np.sort(random.uniform(centroids[0], centroids[-1], len(centroids)))


def gaussian(centroids: F64, counts: U64, random: np.random.Generator) -> F64:
    mean, variance = moments(centroids, counts)
    return np.sort(random.normal(mean, np.sqrt(variance), len(centroids)))


def laplace(centroids: F64, counts: U64, random: np.random.Generator) -> F64:
    mean, variance = moments(centroids, counts)
    return np.sort(random.laplace(mean, np.sqrt(variance / 2), len(centroids)))


def log_uniform(centroids: F64, counts: U64, random: np.random.Generator) -> F64:
    """As many negative values as before; magnitudes are log-uniform between the smallest and the largest."""
    magnitudes = np.abs(centroids[centroids != 0])
    drawn = np.exp(random.uniform(np.log(magnitudes.min()), np.log(magnitudes.max()), len(centroids)))
    return np.sort(np.where(centroids < 0, -drawn, drawn))


def power(exponent: float, centroids: F64, counts: U64, random: np.random.Generator) -> F64:
    """|c| ** exponent with the sign of c; the largest magnitude is preserved."""
    largest = np.abs(centroids).max()
    return np.sign(centroids) * largest * (np.abs(centroids) / largest) ** exponent


def tanh(centroids: F64, counts: U64, random: np.random.Generator) -> F64:
    """Pulls the outer values in: tanh of two deviations is 0.96."""
    mean, variance = moments(centroids, counts)
    deviation = np.sqrt(variance)
    return mean + deviation * np.tanh((centroids - mean) / deviation)


def ranks(centroids: F64, counts: U64, random: np.random.Generator) -> F64:
    """The ranks as values: evenly spaced from the first centroid to the last."""
    return np.linspace(centroids[0], centroids[-1], len(centroids))


DRAWS: dict[str, Change] = {"uniform": uniform, "gaussian": gaussian, "laplace": laplace, "log-uniform": log_uniform}
MAPS: dict[str, Change] = {
    **{f"power-{exponent}": partial(power, exponent) for exponent in (0.5, 0.8, 1.25, 2.0)},
    "tanh": tanh,
    "ranks": ranks,
}


def trials(subject: Subject, seeds: int) -> Iterator[Trial]:
    """Every change in all layers, matched, and once not matched; then one draw in each third and in single layers."""
    thirds = dict(zip(("early", "middle", "late"), np.array_split(subject.layers, 3), strict=True))
    for seed in range(seeds):
        for name, change in (DRAWS if seed else MAPS | DRAWS).items():
            number = None if name in MAPS else seed
            for is_matched in (True,) if seed else (True, False):
                yield _trial(subject, name, change, "all", subject.layers, number, is_matched)
        for part, layers in thirds.items():
            if len(layers):
                yield _trial(subject, "gaussian", gaussian, part, layers.tolist(), seed)
        for layer in subject.spread:
            yield _trial(subject, "gaussian", gaussian, "layer", [layer], seed)


def _trial(
    subject: Subject,
    name: str,
    change: Change,
    part: str,
    layers: list[int],
    seed: int | None,
    is_matched: bool = True,
) -> Trial:
    factors: dict[str, Any] = {
        "change": name,
        "matched": is_matched,
        "where": part,
        "layer": layers[0] if part == "layer" else None,
        "seed": seed,
    }
    return subject.trial(factors, subject.names(layers), matching(change) if is_matched else change, ordered=True)


def charts(rows: list[Row]) -> list[Chart]:
    parts = [row for row in only(rows, matched=True) if row["where"] != "layer"]
    return [
        Chart("parts", "Values replaced in order, mean and variance matched", parts, x="change", series="where"),
        Chart("moments", "In all layers, matched or not", only(rows, where="all"), x="change", series="matched"),
        Chart("layers", "One layer alone, sorted Gaussian draws, matched", having(rows, "layer"), x="layer"),
    ]
