"""Keys and values of one sequence, in pages of 256 positions that hold all layers. Growing moves nothing; memory
comes page by page.

A page is [layers, kv_heads] of one head's keys and values, whose order inside is the kernels' business
(kernels/cache_format.py).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rkf.errors import UsageError
from rkf.model.first_form import ModelConfig
from rkf.runtime.structs import PAGE, WIDE

FORMATS = {"f32": 4, "f16": 2, "int8": 1}  # bytes of a number


def padded_head_dim(config: ModelConfig) -> int:
    """Columns of one position's values."""
    return -(-config.head_dim // WIDE) * WIDE


def head_bytes(config: ModelConfig, number_format: str) -> int:
    """One head's keys and values in a page; int8 has two f32 scales a position besides."""
    numbers = PAGE * (config.head_dim + padded_head_dim(config)) * FORMATS[number_format]
    return numbers + (8 * PAGE if number_format == "int8" else 0)


class KvCache:
    """One sequence's cache; it grows up to `capacity` positions."""

    def __init__(self, config: ModelConfig, capacity: int, number_format: str) -> None:
        self.capacity = capacity
        self.length = 0
        self._page_bytes = config.layers * config.kv_heads * head_bytes(config, number_format)
        self._pages: list[NDArray[np.uint8]] = []
        self._page_addresses = np.zeros(max(-(-capacity // PAGE), 1), np.int64)
        self.pages = self._page_addresses.ctypes.data  # the address of the pages' addresses

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens`."""
        if not 0 <= tokens <= self.length:
            raise UsageError(f"cache: cannot keep {tokens} of {self.length} tokens")
        self.length = tokens

    def reserve(self, tokens: int) -> None:
        """Have pages for so many positions. Memory begins as zeros: what lies past the end is read, and weighs
        nothing.
        """
        while len(self._pages) * PAGE < tokens:
            self._pages.append(np.zeros(self._page_bytes, np.uint8))
            self._page_addresses[len(self._pages) - 1] = self._pages[-1].ctypes.data
