"""Matrices in eight bits and their products, at three to five times the speed of f32. Knows no model.

Every row is cut into blocks of 128 numbers, and each block is stored as whole numbers -127..127 times a scale. Products
of random matrices are then wrong by 0.9 %, which the second moments of a text do not notice (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rkf.file.atomic import reporting
from rkf.format.matrix import F32
from rkf.numbers import eight_bit_kernel
from rkf.numbers.eight_bit_kernel import BLOCK, OFFSET, PANEL, QUAD, TILE

_WIDENED = 8  # panels that a CPU without the kernel widens to f32 at once: few enough to stay in a cache
_LEAST = np.float32(1e-30)  # what is smaller counts as zero: the inverse of a scale must be finite


@dataclass(frozen=True, slots=True)
class Rounded:
    """The left factor of products. shape: rows and columns, without those that fill the last tile and block.

    numbers: i8[blocks, tiled rows, 128]; scales: f32[blocks, tiled rows]; sums: i32[blocks, tiled rows], of numbers.
    """

    shape: tuple[int, int]
    numbers: NDArray[np.int8]
    scales: F32
    sums: NDArray[np.int32]

    @classmethod
    def of(cls, x: F32) -> Rounded:
        """x: f32[rows, cols]"""
        rows, cols = x.shape
        shape = -(-cols // BLOCK), -(-rows // TILE) * TILE
        numbers, sums = np.zeros((*shape, BLOCK), np.int8), np.zeros(shape, np.int32)
        found = cls(x.shape, numbers, np.zeros(shape, np.float32), sums)
        _round(np.ascontiguousarray(x), found.numbers, found.scales, found.sums)
        return found

    def decoded(self) -> F32:
        """f32[rows, cols]"""
        rows, cols = self.shape
        values = self.numbers[:, :rows].astype(np.float32) * self.scales[:, :rows, None]
        return values.swapaxes(0, 1).reshape(rows, -1)[:, :cols]

    def panels(self) -> Panels:
        """The same numbers as a right factor."""
        rows, blocks = self.shape[0], len(self.numbers)
        panels = -(-rows // PANEL)
        numbers = np.full((panels, blocks, BLOCK // QUAD, PANEL, QUAD), OFFSET, np.uint8)
        scales = np.zeros((panels, blocks, PANEL), np.float32)
        _pack(rows, self.numbers, self.scales, numbers, scales)
        return Panels(self.shape, numbers, scales)


@dataclass(frozen=True, slots=True)
class Panels:
    """The right factor of products: rows of weights side by side, as the kernel reads them.

    shape: rows, without those that fill the last panel, and columns. numbers: u8[panels, blocks, 32, 64, 4], 128 added;
    scales: f32[panels, blocks, 64].
    """

    shape: tuple[int, int]
    numbers: NDArray[np.uint8]
    scales: F32

    @classmethod
    def of(cls, weights: F32) -> Panels:
        """weights: f32[rows, cols]"""
        return Rounded.of(weights).panels()

    def product(self, x: F32) -> F32:
        """x weights^T, f32[tokens, rows]. x: f32[tokens, cols]"""
        return rounded_product(Rounded.of(x), self)

    def replace(self, first: int, columns: Panels) -> None:
        """Replace the columns from block `first` on."""
        blocks = slice(first, first + columns.numbers.shape[1])
        self.numbers[:, blocks], self.scales[:, blocks] = columns.numbers, columns.scales

    def __getitem__(self, rows: NDArray[np.integer]) -> F32:
        """Rows by number, f32[rows' shape, cols]."""
        panel, lane = np.divmod(rows, PANEL)
        numbers = self.numbers[panel, :, :, lane].astype(np.float32) - np.float32(OFFSET)
        values = numbers * self.scales[panel, :, lane, None, None]
        return values.reshape(*rows.shape, -1)[..., : self.shape[1]]


class Near:
    """Products of inputs that are close to a known one: only their difference is rounded.

    x: f32[tokens, cols], the known input; y: f32[tokens, rows], its product.
    """

    def __init__(self, weights: Panels, x: F32, y: F32) -> None:
        self._weights, self._x, self._y = weights, x, y

    def product(self, x: F32) -> F32:
        """f32[tokens, rows]. x: f32[tokens, cols]"""
        change = x - self._x
        return self._y + self._weights.product(change) if change.any() else self._y


@contextmanager
def mapped(folder: Path) -> Iterator[Callable[[Panels], Panels]]:
    """Moves matrices to an unnamed file in `folder`: the system may drop its pages from memory at any time.

    Raises OutputError if the file cannot be written.
    """
    with reporting(folder):
        opened = TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - an error in the caller's block is not a write error
    with opened as file:

        def move(weights: Panels) -> Panels:
            start = file.tell()
            with reporting(folder):
                weights.numbers.tofile(file)
            numbers = np.memmap(file, np.uint8, "r", start, weights.numbers.shape)
            return Panels(weights.shape, numbers, weights.scales)

        yield move


def rounded_product(x: Rounded, weights: Panels) -> F32:
    """x weights^T, f32[rows of x, rows of weights]. CPUs without the kernel multiply the same numbers in f32."""
    rows, cols = weights.shape
    if eight_bit_kernel.form() is None:
        wide, product = x.decoded(), np.empty((x.shape[0], rows), np.float32)
        for first in range(0, len(weights.numbers), _WIDENED):
            some = slice(first, first + _WIDENED)
            tile = product[:, first * PANEL : (first + _WIDENED) * PANEL]
            tile[:] = wide @ _unpacked(weights.numbers[some], weights.scales[some])[: tile.shape[1], :cols].T
        return product
    out = np.zeros((x.numbers.shape[1], len(weights.numbers) * PANEL), np.float32)
    eight_bit_kernel.multiply(x.numbers, x.scales, x.sums, weights.numbers, weights.scales, out)
    return out[: x.shape[0], :rows]


@njit(cache=True, nogil=True)
def _round(x, numbers, scales, sums):
    rows, cols = x.shape
    for r in range(rows):
        for b in range(len(numbers)):
            part = x[r, b * BLOCK : min((b + 1) * BLOCK, cols)]
            bits, into = part.view(np.int32), numbers[b, r]
            most = np.int32(0)
            for i in range(bits.size):  # of magnitudes as whole numbers: LLVM does not vectorise a maximum of floats
                most = max(most, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
            largest = np.array([most], np.int32).view(np.float32)[0]
            inverse = np.float32(127) / largest if largest > _LEAST else np.float32(0)
            scales[b, r] = largest / np.float32(127)
            total = np.int32(0)
            for i in range(part.size):
                value = np.int32(np.rint(part[i] * inverse))
                into[i] = value
                total += value
            sums[b, r] = total


@njit(cache=True, nogil=True)
def _pack(rows, numbers, scales, packed, packed_scales):
    for r in range(rows):
        panel, lane = r // PANEL, r % PANEL
        for b in range(len(numbers)):
            packed_scales[panel, b, lane] = scales[b, r]
            for q in range(BLOCK // QUAD):
                for i in range(QUAD):
                    packed[panel, b, q, lane, i] = np.uint8(np.int16(numbers[b, r, q * QUAD + i]) + OFFSET)


@njit(cache=True, nogil=True)
def _unpacked(numbers, scales):
    """f32[panels * 64, blocks * 128]"""
    panels, blocks, quads = numbers.shape[:3]
    out = np.empty((panels * PANEL, blocks * BLOCK), np.float32)
    for panel in range(panels):
        for lane in range(PANEL):
            row = out[panel * PANEL + lane]
            for b in range(blocks):
                for q in range(quads):
                    for i in range(QUAD):
                        number = np.int32(numbers[panel, b, q, lane, i]) - np.int32(OFFSET)
                        row[b * BLOCK + q * QUAD + i] = np.float32(number) * scales[panel, b, lane]
    return out
