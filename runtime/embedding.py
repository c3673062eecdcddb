"""Texts as vectors: the hidden states after a model's last norm, pooled into one and scaled to length 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rkf.runtime.engine import Request

F32 = NDArray[np.float32]
Pooling = Literal["mean", "last"]


class Embedding:
    """The vector of one text, once `request` has been read. pooling: the mean of all tokens' states, or the last."""

    def __init__(self, ids: Sequence[int], pooling: Pooling = "mean") -> None:
        scored = 0 if pooling == "mean" else max(len(ids) - 1, 0)
        self.request = Request(list(ids), None, scores=self._add, scored=scored)
        self._total: NDArray[np.float64] | float = 0.0

    def _add(self, position: int, state: F32) -> None:
        self._total = self._total + state.astype(np.float64)

    def vector(self, dimensions: int | None = None) -> F32:
        """f32[width] of length 1, or of its first `dimensions`. A state of zeros stays one."""
        vector = np.asarray(self._total, np.float64)[:dimensions]
        return (vector / (np.linalg.norm(vector) or 1.0)).astype(np.float32)
