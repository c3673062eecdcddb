"""The residual stream layer by layer, in f32: its scale and its rank correlation with another model's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from rkf.calibrate.layers import SHARED_INPUTS, Layer
from rkf.calibrate.passes import EMBEDDING
from rkf.file.container import Container
from rkf.format.matrix import F32
from rkf.model.first_form import ModelConfig

Seen = Callable[[str, F32], None]
"""Receives the input of each matrix: its name, f32[tokens, cols]."""


def residual_stream(
    container: Container, config: ModelConfig, ids: NDArray[np.int64], *, threads: int | None, seen: Seen | None = None
) -> list[F32]:
    """f32[tokens, hidden] after each layer, for one sequence. Holds the weights of one layer at a time."""
    states = []
    x = container.decode(EMBEDDING)[ids][None]
    with threadpool_limits(threads, "blas"):
        for number in range(config.layers):
            prefix = f"model.layers.{number}."
            found = [name for name in container.tensors if name.startswith(prefix)]
            layer = Layer(config, {name.removeprefix(prefix): container.decode(name) for name in found})
            x = layer(x, tap=None if seen is None else _named(prefix, seen))
            states.append(x[0])
    return states


def _named(prefix: str, seen: Seen) -> Seen:
    """A tap of one layer that reports every matrix by its full name."""
    shared = {names[0]: names for names in SHARED_INPUTS}

    def tap(first: str, values: F32) -> None:
        for name in shared[first]:
            seen(f"{prefix}{name}.weight", values.reshape(-1, values.shape[-1]))

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
