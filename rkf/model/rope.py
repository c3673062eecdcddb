"""Rope angles as tables that grow with the context. Knows the scalings, not the rotation."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from rkf.model.config import ModelConfig

_GROWTH = 1024  # positions computed at a time


def frequencies(config: ModelConfig) -> NDArray[np.float32]:
    """Radians a position, `f32[head_dim / 2]`, as transformers' modeling_rope_utils.py computes them."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain = (1 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.type == "linear":
        return plain / np.float32(scaling.factor)
    # llama3: long waves are stretched, short ones kept, those between blended by how often they turn in the old
    # context.
    given = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context)
    low, high, old = cast(tuple[float, float, float], given)  # ModelConfig.from_metadata has seen to it
    wavelength = 2 * np.pi / plain
    blend = np.clip((old / wavelength - low) / (high - low), 0, 1)
    return ((1 - blend) * plain / scaling.factor + blend * plain).astype(np.float32)


class RopeTable:
    """Cosines and sines of all positions so far, `f32[positions, 2, head_dim / 2]`."""

    def __init__(self, config: ModelConfig) -> None:
        self._frequencies = frequencies(config)
        self._limit = config.context_length
        self._table = np.empty((0, 2, self._frequencies.size), np.float32)
        self._address = self._table.ctypes.data  # kept: numpy takes 1.5 us to tell it

    def address(self, positions: int) -> int:
        """Where the table begins, grown to at least `positions`; good until it grows again."""
        if positions > len(self._table):
            self._table = self._grown(max(positions, min(len(self._table) + _GROWTH, self._limit)))
            self._address = self._table.ctypes.data
        return self._address

    def _grown(self, positions: int) -> NDArray[np.float32]:
        # The product is rounded to f32 first, as transformers does; f64 from there keeps the tables alike on all
        # machines.
        angles = np.arange(positions, dtype=np.float32)[:, None] * self._frequencies
        exact = angles.astype(np.float64)
        return np.stack([np.cos(exact), np.sin(exact)], axis=1).astype(np.float32)
