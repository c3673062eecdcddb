"""Chooses the weights that stay exact, without data. Knows no clusters.

One weight can be essential to a model: clustering a single matrix of 210, with absmax / std of 30, to 16 values raised
a 135M model's perplexity from 20 to 13,475. Keeping the largest 0.1 % of each matrix undoes that (182,802 -> 29.86 with
all matrices at K = 16). Choosing by magnitude relative to the row or the column does several times the damage.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rkf.format.constants import position_bytes
from rkf.format.matrix import F32, Exceptions, from_f32

_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_BUCKET_BITS = 17  # of the magnitude: 512 buckets per octave, so all but a few of the largest are found by bucket
_DROPPED_BITS = np.uint32(31 - _BUCKET_BITS)


def largest(weights: F32, share: float, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """The flat positions, ascending, of the floor(share * size) largest finite weights. Ties go to the first.

    With `rows`: all weights of these rows, and that many of the others.
    """
    whole = np.zeros(0, np.int64)
    if rows is not None:
        whole = (rows[:, None] * weights.shape[1] + np.arange(weights.shape[1])).reshape(-1)
    wanted = int(share * weights.size)
    n = wanted + whole.size
    bits = weights.reshape(-1).view(np.uint32)
    counts = np.zeros(1 << _BUCKET_BITS, np.int64)
    _count_magnitudes(bits, counts)
    reached = np.cumsum(counts[::-1])[::-1]  # number of weights in this bucket or above
    lowest = int(np.flatnonzero(reached >= n)[-1])
    candidates = _at_least(bits, lowest, int(reached[lowest]))
    candidates = np.setdiff1d(candidates, whole, assume_unique=True)
    order = np.argsort(~(bits[candidates] & _MAGNITUDE), kind="stable")
    return np.sort(np.concatenate([whole, candidates[order[:wanted]]]))


def mask(positions: NDArray[np.int64], shape: tuple[int, ...], row: int) -> NDArray[np.bool_]:
    """bool[shape]: the weights at flat `positions` (ascending) in a block of rows that starts at row number `row`."""
    found = np.zeros(shape, np.bool_)
    start = row * shape[1]
    first, last = np.searchsorted(positions, [start, start + found.size])
    found.reshape(-1)[positions[first:last] - start] = True
    return found


def exact(values: F32, positions: NDArray[np.int64], size: int, source_dtype: str) -> Exceptions:
    """The exceptions `values: f32[n]` at flat `positions: i64[n]`, ascending, of a tensor of `size` weights, in the
    source's dtype.

    From an f32 source they are rounded to f16 if its range is sufficient. The error, at most 2^-11, is far below that
    of clustering.
    """
    dtype = "f16" if source_dtype == "f32" and fits_f16(values) else source_dtype
    width = np.dtype(f"<u{position_bytes(size)}")
    return Exceptions(positions.astype(width), from_f32(values, dtype), dtype)


def fits_f16(values: F32) -> bool:
    """Whether rounding to f16 changes every value by at most 2^-11 of itself, or of the root mean square of all."""
    magnitudes = np.abs(values.astype(np.float64))
    return bool(np.sqrt(np.mean(magnitudes**2)) >= 2.0**-14 and magnitudes.max() <= 65504)


@njit(cache=True, nogil=True)
def _count_magnitudes(bits, counts):
    for pattern in bits:
        counts[(pattern & _MAGNITUDE) >> _DROPPED_BITS] += 1


@njit(cache=True, nogil=True)
def _at_least(bits, bucket, n):
    positions = np.empty(n, np.int64)
    found = 0
    for i in range(bits.size):
        if np.int64((bits[i] & _MAGNITUDE) >> _DROPPED_BITS) >= bucket:
            positions[found] = i
            found += 1
    return positions
