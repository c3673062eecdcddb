"""Keys and values of one sequence, in pages of 256 positions that hold all layers. Growing moves nothing; memory comes
page by page.

A page is [layers, kv_heads] of keys [16 blocks, head_dim, 16 positions], then values [256, padded head_dim]
(kernels/attention.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.config import ModelConfig
from rkf.errors import UsageError
from rkf.runtime.layout import LANES, PAGE

FORMATS: dict[str, np.dtype[Any]] = {"f16": np.dtype("<f2"), "f32": np.dtype("<f4")}


def page_values(config: ModelConfig) -> int:
    """Numbers in one page."""
    padded = -(-config.head_dim // LANES) * LANES
    return config.layers * config.kv_heads * PAGE * (config.head_dim + padded)


class KvCache:
    """One sequence's cache; it grows up to `capacity` positions."""

    def __init__(self, config: ModelConfig, capacity: int, number_format: str) -> None:
        self.capacity = capacity
        self.length = 0
        self._values, self._dtype = page_values(config), FORMATS[number_format]
        self._pages: list[NDArray] = []
        self.page_addresses = np.zeros(max(-(-capacity // PAGE), 1), np.int64)

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens`."""
        if not 0 <= tokens <= self.length:
            raise UsageError(f"cache: cannot keep {tokens} of {self.length} tokens")
        self.length = tokens

    def reserve(self, tokens: int) -> None:
        """Have pages for so many positions. Memory begins as zeros: lanes past the end are multiplied by a weight of
        zero.
        """
        while len(self._pages) * PAGE < tokens:
            self._pages.append(np.zeros(self._values, self._dtype))
            self.page_addresses[len(self._pages) - 1] = self._pages[-1].ctypes.data
