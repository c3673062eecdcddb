"""Memory for the values of a program: rows of all tokens, shared by the threads, and one private row for each thread.

Each value has a buffer for each width, because columns past its last must stay zero. Knows structs, no ops.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rkf.runtime.matrices import Memory
from rkf.runtime.structs import ACTIVATION, BLOCK, PACKED_BLOCK_BYTES, ROUNDED_BLOCK_BYTES, end_column

TILE = 256  # tokens of one pass
LINE = 64


class Place(NamedTuple):
    """The place of a value: a VALUE of structs.py."""

    address: int
    stride: int
    private: int

    def later(self, columns: int) -> Place:
        """The same rows from a given column on."""
        return self._replace(address=self.address + 4 * columns)


NOWHERE = Place(0, 0, 0)


class _Private(NamedTuple):
    """An ACTIVATION in each thread's memory: the offsets of the struct, of its values, and of its packed form, which is
    followed by a scale and a sum per row.
    """

    offset: int
    columns: int
    rows: int
    rounded: bool
    values: Place
    packed: int


class Buffers:
    """Places of values. Private ones are offsets until `thread_memory` allocates the memory of a thread."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._shared: dict[Hashable, Place] = {}
        self._shared_activations: dict[Hashable, int] = {}
        self._words: dict[Hashable, int] = {}
        self._private: dict[Hashable, Place] = {}
        self._private_activations: dict[Hashable, _Private] = {}
        self._private_bytes = LINE  # an offset of 0 would mean "not there"
        self.widest = 0

    def value(self, name: Hashable, columns: int, *, private: bool, rows: int = 1) -> Place:
        """The place of a value. rows: per token."""
        self.widest = max(self.widest, columns)
        key = name, columns, rows
        if private:
            if key not in self._private:
                stride = padded(columns, BLOCK) * 4
                self._private[key] = Place(self._take(stride * rows), stride, 1)
            return self._private[key]
        if key not in self._shared:
            stride = apart(padded(columns, BLOCK) * 4)
            self._shared[key] = Place(self._memory.zeros(stride * TILE * rows), stride, 0)
        return self._shared[key]

    def words(self, name: Hashable, count: int) -> int:
        """The address of i64[count] that all threads share."""
        if name not in self._words:
            self._words[name] = self._memory.zeros(8 * count)
        return self._words[name]

    def activation(
        self, values: Place, columns: int, *, private: bool, rows: int = 1, rounded: bool = False
    ) -> tuple[int, int]:
        """The ACTIVATION of a value at a place: its address, or its offset in a thread's memory and 1."""
        key = values, columns, rounded
        if not private:
            if key not in self._shared_activations:
                a = self._shared_activation(values, columns, TILE * rows, rounded)
                self._shared_activations[key] = self._memory.hold(a)
            return self._shared_activations[key], 0
        if key not in self._private_activations:
            packed = self._take(rows * (packed_bytes(columns, rounded) + 8))
            offset = self._take(ACTIVATION.itemsize)
            self._private_activations[key] = _Private(offset, columns, rows, rounded, values, packed)
        return self._private_activations[key].offset, 1

    def thread_memory(self) -> int:
        """The address of a new thread's private memory, with its activations filled in."""
        base = self._memory.zeros(self._private_bytes)
        for offset, columns, rows, rounded, values, packed in self._private_activations.values():
            a, size = _activation(columns, rounded), packed_bytes(columns, rounded)
            a["values"] = values.address + values.private * base
            a["values_stride"], a["packed_stride"] = values.stride, size
            a["packed"] = base + packed
            a["scale"], a["total"] = base + packed + rows * size, base + packed + rows * (size + 4)
            self._memory.copy(a, base + offset)
        return base

    def _shared_activation(self, values: Place, columns: int, rows: int, rounded: bool) -> NDArray:
        a, memory = _activation(columns, rounded), self._memory
        stride = apart(packed_bytes(columns, rounded))
        a["values"], a["values_stride"] = values.address, values.stride
        a["packed"], a["packed_stride"] = memory.zeros(stride * rows), stride
        a["scale"], a["total"] = memory.zeros(4 * rows), memory.zeros(4 * rows)
        return a

    def _take(self, size: int) -> int:
        offset = self._private_bytes
        self._private_bytes += padded(size, LINE)
        return offset


def _activation(columns: int, rounded: bool) -> NDArray:
    a = np.zeros(1, ACTIVATION)
    a["columns"], a["end"] = columns, end_column(columns)
    a["rounded"] = packed_bytes(columns) if rounded else 0
    return a


def packed_bytes(columns: int, rounded: bool = False) -> int:
    """Bytes of a row of packed activations."""
    return padded(columns, BLOCK) // BLOCK * (PACKED_BLOCK_BYTES + rounded * ROUNDED_BLOCK_BYTES)


def apart(size: int) -> int:
    """Bytes from one token to the next: one cache line more than the row takes. Tokens whole pages apart would compete
    for the same places in the caches (docs/log.md has the few measurements).
    """
    return size + LINE


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
