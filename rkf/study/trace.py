"""The residual stream layer by layer, in f32: its scale and its rank correlation with another model's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from rkf.calibrate import interpreter
from rkf.calibrate.interpreter import Flow, Stretch
from rkf.errors import UsageError
from rkf.file.container import Container
from rkf.format.matrix import F32

Seen = Callable[[str, F32], None]
"""Receives the input of each matrix: its name, f32[tokens, cols]. Experts, which see few tokens each, are left out."""


def residual_stream(
    container: Container, ids: NDArray[np.int64], *, threads: int | None, seen: Seen | None = None
) -> list[F32]:
    """f32[tokens, hidden] after each layer, for one sequence. Holds the weights of one layer at a time."""
    if container.model is None:
        raise UsageError(f"{container.path}: no model: expected a whole one, as `rkf convert` writes it")
    program, states = container.model.program, []
    stream = program.top[0].reads()[0]
    tap = None if seen is None else _named(seen)
    with threadpool_limits(threads, "blas"):
        stem = Stretch.stem(program, len(ids))
        flow = stem(_weights(container, stem), Flow(ids[None]))
        for number in range(program.layers):
            layer = Stretch.of_layer(program, number, len(ids))
            flow = layer(_weights(container, layer), flow, tap=tap)
            states.append(flow.values[stream][0])
    return states


def _weights(container: Container, stretch: Stretch) -> dict[str, F32]:
    return {name: container.decode(name) for name in stretch.names}


def _named(told: Seen) -> interpreter.Tap:
    """A tap that reports every matrix by its full name."""

    def tap(seen: interpreter.Seen) -> None:
        if seen.expert is None:
            for name in seen.names:
                told(name, seen.x)

    return tap


def compared(states: list[F32], unchanged: list[F32]) -> dict[str, list[float]]:
    """For each layer, averaged over the tokens: "scale", the ratio of root mean squares (geometric mean); "spearman",
    the rank correlation of a token's features.
    """
    pairs = list(zip(states, unchanged, strict=True))
    return {
        "scale": [float(np.exp(np.mean(np.log(_rms(x) / _rms(y))))) for x, y in pairs],
        "spearman": [float(spearman(x, y).mean()) for x, y in pairs],
    }


def spearman(x: F32, y: F32) -> NDArray[np.float64]:
    """Spearman's rank correlation of each row: f64[rows]. Equal numbers are ranked in order of appearance."""
    deviations = [np.argsort(np.argsort(values, axis=1), axis=1) - (values.shape[1] - 1) / 2 for values in (x, y)]
    a, b = deviations
    correlation: NDArray[np.float64] = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return correlation


def _rms(x: F32) -> NDArray[np.float64]:
    """The root mean square of each row: f64[rows]."""
    root: NDArray[np.float64] = np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1))
    return root
