"""Products of several tokens on AVX-512. Lanes are rows, so sums need no shuffles at the end.

The planes of a block are transposed as they are, in words of sixteen rows, and looked up after that: transposing bytes
takes four times the shuffles. Few tokens multiply what is looked up at once, 32 columns of two panels at a time, and
only their totals are in memory. For many tokens a panel is looked up to memory, [columns / 4, 16 rows, 4 columns], and
four tokens' totals stay in registers. docs/log.md lists the slower designs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels import products
from rkf.runtime.kernels.inline import inline, larger, piece, smaller
from rkf.runtime.kernels.instructions import dot_bytes
from rkf.runtime.kernels.memory import load, local_bytes, prefetch, store
from rkf.runtime.kernels.simd import bitcast, splat, transpose_quads
from rkf.runtime.kernels.vectors import I8x64, I32x16
from rkf.runtime.kernels.views import view
from rkf.runtime.kernels.weights_avx512 import PANEL_BYTES, PANEL_PLANE_BYTES, PANEL_WEIGHTS
from rkf.runtime.structs import ACTIVATION, BLOCK, LANES, MATRIX, PACKED_BLOCK_BYTES, ROUNDED, TILE_ROWS

_FEW = 48  # tokens
_GROUP = ROUNDED  # columns that few tokens multiply at a time
_ROUNDED_STEP_BYTES = BLOCK + BLOCK // ROUNDED * 4  # bytes, then multiples
_TOTALS_BYTES = TILE_ROWS * 4  # of a token
_BLOCK_BYTES = BLOCK * LANES  # of a panel that is looked up
_TWO_PANELS = 2 * PANEL_BYTES


# --- panels


@inline
def _transpose_plane(plane, stride, width, row, column, target):
    """Transpose a block of sixteen rows. Prefetched are, into the second-level cache, the block of the rows after the
    next sixteen, and into the first that after the next, which nobody has prefetched for the first rows of a job.
    """
    source = plane + row * stride + (column * width >> 3)
    for quad in range(width):
        transpose_quads(source + quad * 16, stride, target + quad * 256)
    if width > 0:
        for i in range(LANES):
            prefetch(source + (TILE_ROWS + i) * stride, 2)
            prefetch(source + i * stride + width * (2 * BLOCK // 8), 3)


@inline
def _transpose_block(m, row, column, panel):
    """The planes of rows row … row + 15, as weights_avx512.PANEL_WEIGHTS reads them."""
    _transpose_plane(m.plane0, m.stride0, m.width0, row, column, panel)
    _transpose_plane(m.plane1, m.stride1, m.width1, row, column, panel + PANEL_PLANE_BYTES)
    _transpose_plane(m.plane2, m.stride2, m.width2, row, column, panel + 2 * PANEL_PLANE_BYTES)


@inline
def _blocks(m):
    return (m.columns + BLOCK - 1) // BLOCK


@inline
def _step(total, a, b, x):
    """Two products of four columns: those of two panels with a token's bytes."""
    four = bitcast(I8x64, splat(I32x16, load(types.int32, x)))
    return dot_bytes(total[0], a, four), dot_bytes(total[1], b, four)


@inline
def _nothing():
    zero = splat(I32x16, types.int32(0))
    return zero, zero


@inline
def _joined(high, low):
    return (high[0] << 7) + low[0], (high[1] << 7) + low[1]


@inline
def _multiplied(part, multiple):
    factor = splat(I32x16, load(types.int32, multiple))
    return part[0] * factor, part[1] * factor


@inline
def _store(address, total):
    store(address, total[0])
    store(address + 64, total[1])


@inline
def _sum(a, b):
    return a[0] + b[0], a[1] + b[1]


# --- few tokens


@inline
def _group(a, b, x):
    """The sums of 32 columns, the even ones and the odd ones, of two panels with a token's bytes."""
    odd = x + BLOCK // 2
    total = _step(_nothing(), a[0], b[0], x)
    total = _step(total, a[1], b[1], x + 4)
    total = _step(total, a[2], b[2], x + 8)
    total = _step(total, a[3], b[3], x + 12)
    total = _step(total, a[4], b[4], odd)
    total = _step(total, a[5], b[5], odd + 4)
    total = _step(total, a[6], b[6], odd + 8)
    return _step(total, a[7], b[7], odd + 12)


@inline
def _add(address, total):
    _store(address, _sum((load(I32x16, address), load(I32x16, address + 64)), total))


def _few(weights: Callable[..., Any]) -> Callable[..., Any]:
    @inline
    def group_of(panel, table, group):
        e0, o0 = weights(panel, table, 4 * group, 0)
        e1, o1 = weights(panel, table, 4 * group + 1, 0)
        e2, o2 = weights(panel, table, 4 * group + 2, 0)
        e3, o3 = weights(panel, table, 4 * group + 3, 0)
        return e0, e1, e2, e3, o0, o1, o2, o3

    @piece
    def sums(m, x, tokens, first, second, table, totals):
        for token in range(tokens):
            _store(totals + token * _TOTALS_BYTES, _nothing())
        panels = local_bytes(_TWO_PANELS)
        for block in range(_blocks(m)):
            column = smaller(block * BLOCK, m.end - BLOCK)
            _transpose_block(m, first, column, panels)
            _transpose_block(m, second, column, panels + PANEL_BYTES)
            for group in range(BLOCK // _GROUP):
                a, b = group_of(panels, table, group), group_of(panels + PANEL_BYTES, table, group)
                at, total = group * (_GROUP // 2), totals
                if x.rounded != 0:
                    step = x.packed + x.rounded + block * _ROUNDED_STEP_BYTES
                    for _ in range(tokens):
                        _add(total, _multiplied(_group(a, b, step + at), step + BLOCK + group * 4))
                        step += x.packed_stride
                        total += _TOTALS_BYTES
                else:
                    step = x.packed + block * PACKED_BLOCK_BYTES
                    for _ in range(tokens):
                        _add(total, _joined(_group(a, b, step + at), _group(a, b, step + at + BLOCK)))
                        step += x.packed_stride
                        total += _TOTALS_BYTES

    return sums


# --- many tokens


@inline
def _four_tokens(panels, panel_bytes, x, token, last):
    """Totals of two panels for tokens token … token + 3 (past the end, the last token repeats)."""
    x0, x1, x2, x3 = _rows(x.packed, x.packed_stride, token, last)
    high0 = high1 = high2 = high3 = low0 = low1 = low2 = low3 = _nothing()
    for block in range(panel_bytes // _BLOCK_BYTES):
        weights, offset = panels + block * _BLOCK_BYTES, block * PACKED_BLOCK_BYTES
        for _ in range(BLOCK // 4):
            a, b = load(I8x64, weights), load(I8x64, weights + panel_bytes)
            high0, low0 = _step(high0, a, b, x0 + offset), _step(low0, a, b, x0 + offset + BLOCK)
            high1, low1 = _step(high1, a, b, x1 + offset), _step(low1, a, b, x1 + offset + BLOCK)
            high2, low2 = _step(high2, a, b, x2 + offset), _step(low2, a, b, x2 + offset + BLOCK)
            high3, low3 = _step(high3, a, b, x3 + offset), _step(low3, a, b, x3 + offset + BLOCK)
            weights += 64
            offset += 4
    return _joined(high0, low0), _joined(high1, low1), _joined(high2, low2), _joined(high3, low3)


@inline
def _four_tokens_rounded(panels, panel_bytes, x, token, last):
    """`_four_tokens` of rounded activations: sums over 32 columns, times their multiple."""
    x0, x1, x2, x3 = _rows(x.packed + x.rounded, x.packed_stride, token, last)
    t0 = t1 = t2 = t3 = _nothing()
    for block in range(panel_bytes // _BLOCK_BYTES):
        for group in range(BLOCK // ROUNDED):
            p0 = p1 = p2 = p3 = _nothing()
            for half in range(2):  # even columns, then odd ones
                weights = panels + block * _BLOCK_BYTES + half * _BLOCK_BYTES // 2 + group * ROUNDED // 2 * LANES
                offset = block * _ROUNDED_STEP_BYTES + half * BLOCK // 2 + group * ROUNDED // 2
                for _ in range(ROUNDED // 8):
                    a, b = load(I8x64, weights), load(I8x64, weights + panel_bytes)
                    p0, p1 = _step(p0, a, b, x0 + offset), _step(p1, a, b, x1 + offset)
                    p2, p3 = _step(p2, a, b, x2 + offset), _step(p3, a, b, x3 + offset)
                    weights += 64
                    offset += 4
            multiple = block * _ROUNDED_STEP_BYTES + BLOCK + group * 4
            t0, t1 = _sum(t0, _multiplied(p0, x0 + multiple)), _sum(t1, _multiplied(p1, x1 + multiple))
            t2, t3 = _sum(t2, _multiplied(p2, x2 + multiple)), _sum(t3, _multiplied(p3, x3 + multiple))
    return t0, t1, t2, t3


@inline
def _rows(packed, stride, token, last):
    return (
        packed + token * stride,
        packed + smaller(token + 1, last) * stride,
        packed + smaller(token + 2, last) * stride,
        packed + smaller(token + 3, last) * stride,
    )


def _look_up(weights: Callable[..., Any]) -> Callable[..., Any]:
    @piece
    def look_up(m, row, table, panel):
        """Sixteen rows as bytes: for each block, steps of four even columns, then of four odd ones."""
        planes = local_bytes(PANEL_BYTES)
        for block in range(_blocks(m)):
            _transpose_block(m, row, smaller(block * BLOCK, m.end - BLOCK), planes)
            for eight in range(BLOCK // 8):
                even, odd = weights(planes, table, eight, 0)
                store(panel + eight * 64, even)
                store(panel + eight * 64 + _BLOCK_BYTES // 2, odd)
            panel += _BLOCK_BYTES

    @inline
    def look_up_two(m, first, second, table, panels):
        look_up(m, first, table, panels)
        look_up(m, second, table, panels + _blocks(m) * _BLOCK_BYTES)

    return look_up_two


@inline
def _four_sums(m, x, token, last, panels, totals):
    """The totals of tokens token … token + 3, i32[4, 32]."""
    panel_bytes = _blocks(m) * _BLOCK_BYTES
    if x.rounded != 0:
        t0, t1, t2, t3 = _four_tokens_rounded(panels, panel_bytes, x, token, last)
    else:
        t0, t1, t2, t3 = _four_tokens(panels, panel_bytes, x, token, last)
    _store(totals, t0)
    _store(totals + _TOTALS_BYTES, t1)
    _store(totals + 2 * _TOTALS_BYTES, t2)
    _store(totals + 3 * _TOTALS_BYTES, t3)


def multiply_many(width: str) -> Callable[..., Any]:
    """y[token, row] for several tokens, 32 rows at a time: two panels of sixteen.

    A panel that would end past the matrix begins earlier, and one that ends past `high` or the rows of a table is not
    used to its end. Scratch holds the totals of some tokens, i32[tokens, 32], and for many tokens the panels.
    """
    weights = PANEL_WEIGHTS[width]
    few, look_up = _few(weights), _look_up(weights)

    @inline
    def store_panel(m, x, token, last, y, y_stride, row, end, digit, totals):
        """Rows row … end - 1 of tokens token … last, whose totals begin at `totals`."""
        for each in range(token, last + 1):
            total, out = load(I32x16, totals + (each - token) * _TOTALS_BYTES), y + each * y_stride + row * 4
            products.store_rows(total, m, x, each, out, row, end - row, digit)

    def kernel(matrix, activation, tokens, y, y_stride, low, high, scratch):
        m, x = view(MATRIX, matrix), view(ACTIVATION, activation)
        row = low
        while row < high:
            index = row // m.rows_per_table
            end = smaller(smaller(high, (index + 1) * m.rows_per_table), row + TILE_ROWS)
            middle = smaller(row + LANES, end)
            final = larger(m.rows - LANES, 0)  # smaller matrices have rows of zeros after their own
            first, second = smaller(row, final), smaller(middle, final)
            totals, second_totals = scratch + (row - first) * 4, scratch + LANES * 4 + (middle - second) * 4
            at_once, panels = tokens, scratch + 5 * _TOTALS_BYTES
            for digit in range(m.digits):
                table = m.table + (index * m.digits + digit) * m.table_bytes
                if tokens <= _FEW:
                    few(m, x, tokens, first, second, table, scratch)
                else:
                    at_once = types.int64(4)
                    look_up(m, first, second, table, panels)
                for token in range(0, tokens, at_once):
                    last = smaller(token + at_once, tokens) - 1
                    if tokens > _FEW:
                        _four_sums(m, x, token, tokens - 1, panels, scratch)
                    store_panel(m, x, token, last, y, y_stride, row, middle, digit, totals)
                    store_panel(m, x, token, last, y, y_stride, middle, end, digit, second_totals)
            row = end

    return kernel
