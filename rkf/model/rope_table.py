"""Rope's angles as tables that grow with the context. Knows frequencies, not their origin."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GROWTH = 1024  # positions computed at a time


class RopeTable:
    """Cosines and sines of all positions so far, each times the attention factor: f32[positions, 2, frequencies]."""

    def __init__(self, frequencies: tuple[float, ...], factor: float, limit: int) -> None:
        self._frequencies, self._factor, self._limit = np.array(frequencies, np.float32), factor, limit
        self._table = np.empty((0, 2, self._frequencies.size), np.float32)
        self._address = self._table.ctypes.data  # cached: numpy takes 1.5 us to return it

    def address(self, positions: int) -> int:
        """The start of the table, grown to at least `positions`; valid until it grows again."""
        if positions > len(self._table):
            self._table = self._grown(max(positions, min(len(self._table) + GROWTH, self._limit)))
            self._address = self._table.ctypes.data
        return self._address

    def _grown(self, positions: int) -> NDArray[np.float32]:
        # The product is rounded to f32 first, as in transformers. From there, f64 gives equal tables on all machines.
        angles = np.arange(positions, dtype=np.float32)[:, None] * self._frequencies
        exact = angles.astype(np.float64)
        return (np.stack([np.cos(exact), np.sin(exact)], axis=1) * self._factor).astype(np.float32)
