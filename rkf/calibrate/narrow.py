"""Matrices in 16 bits that are read by many products, widened to f32 one tile at a time. Knows no model.

Widening takes a fifth of a product's time with 64 rows of x; f32 matrices would take twice the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from rkf.file.atomic import reporting
from rkf.format.matrix import F32, from_f32, to_f32

_TILE = 1 << 18  # weights widened at once: 1 MB, which fits the second-level cache


@dataclass(frozen=True, slots=True)
class Narrow:
    """A matrix, bf16[rows, cols], or a stack of them."""

    bits: NDArray[np.uint16]

    @classmethod
    def of(cls, weights: F32) -> Narrow:
        """In memory, rounded."""
        return cls(from_f32(weights, "bf16"))

    def __getitem__(self, rows: NDArray[np.integer]) -> F32:
        """Rows by number, f32[rows' shape, cols]."""
        return to_f32(self.bits[rows], "bf16")

    def matrix(self, number: int) -> Narrow:
        """One matrix of a stack."""
        return Narrow(self.bits[number])


@contextmanager
def mapped(folder: Path) -> Iterator[Callable[[F32], Narrow]]:
    """The same as `Narrow.of`, in an unnamed file in `folder`: the system may drop its pages from memory at any time.

    Raises OutputError if the file cannot be written.
    """
    with reporting(folder):
        opened = TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - an error in the caller's block is not a write error
    with opened as file:

        def keep(weights: F32) -> Narrow:
            bits, start = from_f32(weights, "bf16"), file.tell()
            with reporting(folder):
                bits.tofile(file)
            return Narrow(np.memmap(file, np.uint16, "r", start, weights.shape))

        yield keep


def product(x: F32, weights: F32 | Narrow) -> F32:
    """x weights^T, f32[tokens, rows]. x: f32[tokens, cols]; weights: [rows, cols]."""
    if not isinstance(weights, Narrow):
        return x @ weights.T
    rows, cols = weights.bits.shape
    out = np.empty((len(x), rows), np.float32)
    step = max(1, _TILE // cols)
    for start in range(0, rows, step):
        tile = slice(start, start + step)
        np.matmul(x, to_f32(weights.bits[tile], "bf16").T, out=out[:, tile])
    return out
