"""Counts the memory of sequences: arrays and tensors while they live. Knows no cache."""

from __future__ import annotations

from typing import Protocol
from weakref import finalize


class _Sized(Protocol):
    """An array of numpy or a tensor of torch."""

    @property
    def nbytes(self) -> int: ...


class HeldBytes:
    """bytes: those of everything that was counted and still lives."""

    def __init__(self) -> None:
        self.bytes = 0

    def count(self, array: _Sized) -> None:
        self.bytes += array.nbytes
        finalize(array, self._forget, array.nbytes).atexit = False

    def _forget(self, size: int) -> None:
        self.bytes -= size
