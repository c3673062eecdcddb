"""The Walsh-Hadamard transform of blocks of numbers: the arithmetic of the op `hadamard`. Knows no program.

Sums are added in one order on every CPU, so a conversion gives the same bytes everywhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

_TOGETHER = 1 << 16  # numbers transformed at a time: they and their sums stay in the second-level cache


def transformed(x: F32, block: int) -> F32:
    """Each `block` neighbours of the last axis times H / sqrt(block), where H[i, j] is -1 to the number of common bits
    of i and j. It is its own inverse.

    x: f32[..., width]; block: a power of two that divides width.
    """
    blocks = x.reshape(-1, block)
    out = np.empty_like(blocks)
    for start in range(0, len(blocks), max(1, _TOGETHER // block)):
        part = slice(start, start + max(1, _TOGETHER // block))
        out[part] = _sums(np.ascontiguousarray(blocks[part].T)).T
    out *= np.float32(block**-0.5)
    return out.reshape(x.shape)


def _sums(columns: F32) -> F32:
    """H times `columns`: f32[block, n], n transforms side by side so that inner loops are long."""
    block, count = columns.shape
    distance = 1
    while distance < block:
        pairs = columns.reshape(-1, 2, distance, count)
        after = np.empty_like(pairs)
        np.add(pairs[:, 0], pairs[:, 1], out=after[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=after[:, 1])
        columns = after.reshape(block, count)
        distance *= 2
    return columns
