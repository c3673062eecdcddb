"""The Walsh-Hadamard transform of blocks of numbers: the arithmetic of the op `hadamard`. Knows no program.

Sums are added in one order on every CPU, so a conversion gives the same bytes everywhere.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def transformed(x: F32, block: int) -> F32:
    """Each `block` neighbours of the last axis times H / sqrt(block), where H[i, j] is -1 to the number of common bits
    of i and j. It is its own inverse.

    x: f32[..., width]; block: a power of two that divides width.
    """
    out = x.reshape(-1, block).copy()
    _transform(out, np.float32(block**-0.5))
    return out.reshape(x.shape)


@njit(cache=True, nogil=True)
def _transform(blocks, scale):
    """Two steps of distance d and 2 d at a time, with the sums of one step after the other."""
    for block in blocks:
        n, d = block.size, 1
        while 4 * d <= n:
            for start in range(0, n, 4 * d):
                for i in range(start, start + d):
                    a, b = block[i] + block[i + d], block[i] - block[i + d]
                    e, f = block[i + 2 * d] + block[i + 3 * d], block[i + 2 * d] - block[i + 3 * d]
                    block[i], block[i + d] = a + e, b + f
                    block[i + 2 * d], block[i + 3 * d] = a - e, b - f
            d *= 4
        if d < n:
            for i in range(d):
                block[i], block[i + d] = block[i] + block[i + d], block[i] - block[i + d]
        for i in range(n):
            block[i] *= scale
