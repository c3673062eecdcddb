"""Products of 2 to 32 tokens on AVX-512: sixteen rows are decoded to bytes once, then multiplied with two tokens at a
time.

Two rows share a register, half of it each. So one tree turns sixteen sums of eight lanes into sixteen totals, and each
load of weights or activations serves two or four products. Columns are processed in slabs whose bytes and activations
stay in the first-level cache; meanwhile the next rows' planes are prefetched into the second-level cache. docs/log.md
lists the slower designs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels.inline import inline, piece, smaller
from rkf.runtime.kernels.memory import load, prefetch, store
from rkf.runtime.kernels.simd import dot_bytes, even_lanes, join, odd_lanes, part, splat
from rkf.runtime.kernels.vectors import I8x32, I8x64, I32x8, I32x16
from rkf.runtime.structs import BLOCK, PACKED_BLOCK_BYTES

ROWS = 16
_SLAB_BLOCKS = 12  # 24 kB of bytes, and 6 kB of activations for two tokens
_PAIR_BLOCK_BYTES = 2 * BLOCK  # for two rows: even columns 0 to 31 of both, 32 to 63, then the odd ones
SUM_BYTES = ROWS * 4


@inline
def _store_halves(target, register):
    store(target, part(I8x32, register, 0))
    store(target + 64, part(I8x32, register, 1))


@inline
def _both(address):
    """32 activations, repeated for both rows of a pair."""
    half = load(I8x32, address)
    return join(I8x64, half, half)


@inline
def _four_dots(totals, w, x):
    return (
        dot_bytes(totals[0], w[0], x),
        dot_bytes(totals[1], w[1], x),
        dot_bytes(totals[2], w[2], x),
        dot_bytes(totals[3], w[3], x),
    )


@inline
def _folded(a, b):
    """Sums of neighbouring lanes, of a and then of b."""
    return even_lanes(a, b) + odd_lanes(a, b)


@inline
def _whole(high, low):
    """Totals of four pairs of rows, two lanes per row."""
    t0, t1, t2, t3 = (high[0] << 7) + low[0], (high[1] << 7) + low[1], (high[2] << 7) + low[2], (high[3] << 7) + low[3]
    return _folded(_folded(t0, t1), _folded(t2, t3))


@inline
def _eight_rows_two_tokens(pairs, pair_bytes, x0, x1, blocks):
    """Sums of eight rows for the first token, then for the second, I32x16."""
    zero = splat(I32x16, types.int32(0))
    high0 = low0 = high1 = low1 = (zero, zero, zero, zero)
    for block in range(blocks):
        weights, offset = pairs + block * _PAIR_BLOCK_BYTES, block * PACKED_BLOCK_BYTES
        for _ in range(4):
            w = (
                load(I8x64, weights),
                load(I8x64, weights + pair_bytes),
                load(I8x64, weights + 2 * pair_bytes),
                load(I8x64, weights + 3 * pair_bytes),
            )
            high0 = _four_dots(high0, w, _both(x0 + offset))
            low0 = _four_dots(low0, w, _both(x0 + offset + BLOCK))
            high1 = _four_dots(high1, w, _both(x1 + offset))
            low1 = _four_dots(low1, w, _both(x1 + offset + BLOCK))
            weights += 64
            offset += 32
    return _folded(_whole(high0, low0), _whole(high1, low1))


@inline
def _add(address, value):
    store(address, load(I32x8, address) + value)


@inline
def _fetch(plane, stride, width, first, last, begin, end):
    """Prefetch blocks begin … end - 1 of a plane's rows first … last - 1; a prefetch past a plane does not fault."""
    block_bytes = BLOCK // 8 * width
    for row in range(first, last):
        for offset in range(begin * block_bytes, end * block_bytes, 64):
            prefetch(plane + row * stride + offset, 2)


@inline
def fetch_rows(m, first, last):
    """Prefetch whole rows first … last - 1."""
    blocks = (m.columns + BLOCK - 1) // BLOCK
    _fetch(m.plane0, m.stride0, m.width0, first, last, types.int64(0), blocks)
    _fetch(m.plane1, m.stride1, m.width1, first, last, types.int64(0), blocks)
    _fetch(m.plane2, m.stride2, m.width2, first, last, types.int64(0), blocks)


def sixteen_rows(weights: Callable[..., Any]) -> Callable[..., Any]:
    """sums(m, x, tokens, row, last, digit, scratch) writes the integer sums of rows row … row + 15 to the start of
    scratch, `i32[tokens, 16]`, with tokens rounded up to a pair. Past the end, the last row repeats. The rest of
    scratch holds the decoded rows.
    """

    @piece
    def decode(m, row, last, digit, begin, end, pairs, pair_bytes):
        """Decode the columns of blocks begin … end - 1."""
        index = row // m.rows_per_table
        for i in range(ROWS):
            source = smaller(row + i, last)
            if source == (index + 1) * m.rows_per_table:
                index += 1
            table = m.table + (index * m.digits + digit) * m.table_bytes
            target = pairs + i // 2 * pair_bytes + i % 2 * 32
            for block in range(begin, end):
                even, odd = weights(m, table, source, smaller(block * BLOCK, m.end - BLOCK))
                _store_halves(target, even)
                _store_halves(target + BLOCK, odd)
                target += _PAIR_BLOCK_BYTES

    @piece
    def sums(m, x, tokens, row, last, digit, scratch):
        for token in range(0, tokens, 2):
            store(scratch + token * SUM_BYTES, splat(I32x16, types.int32(0)))
            store(scratch + (token + 1) * SUM_BYTES, splat(I32x16, types.int32(0)))
        pairs, blocks = scratch + (tokens + 1) // 2 * 2 * SUM_BYTES, (m.columns + BLOCK - 1) // BLOCK
        for begin in range(0, blocks, _SLAB_BLOCKS):
            end = smaller(begin + _SLAB_BLOCKS, blocks)
            pair_bytes = (end - begin) * _PAIR_BLOCK_BYTES
            decode(m, row, last, digit, begin, end, pairs, pair_bytes)
            ahead, share = row + ROWS, (ROWS + tokens - 1) // tokens
            for token in range(0, tokens, 2):
                x0 = x.packed + token * x.packed_stride + begin * PACKED_BLOCK_BYTES
                x1 = x.packed + smaller(token + 1, tokens - 1) * x.packed_stride + begin * PACKED_BLOCK_BYTES
                for half in range(2):
                    _fetch(m.plane0, m.stride0, m.width0, ahead, ahead + share, begin, end)
                    _fetch(m.plane1, m.stride1, m.width1, ahead, ahead + share, begin, end)
                    _fetch(m.plane2, m.stride2, m.width2, ahead, ahead + share, begin, end)
                    ahead += share
                    rows, target = pairs + half * 4 * pair_bytes, scratch + token * SUM_BYTES + half * SUM_BYTES // 2
                    both = _eight_rows_two_tokens(rows, pair_bytes, x0, x1, end - begin)
                    _add(target, part(I32x8, both, 0))
                    _add(target + SUM_BYTES, part(I32x8, both, 1))

    return sums
