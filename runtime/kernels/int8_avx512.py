"""Fast products on AVX-512 (VBMI, VNNI): vpermb looks up 64 ranks at once, vpdpbusd multiplies the bytes.

The index of a value in its table has the bits of the first plane lowest and those of later planes above them, because
so they need not be moved; runtime/matrices.py orders tables by it. Tables repeat to fill a register, so undefined bits
above an index do no harm. A table of 7 bits is two registers, for even and odd ranks: the 1-bit plane chooses between
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.format.constants import plane_bits
from rkf.runtime.kernels import few_avx512, products, ranks
from rkf.runtime.kernels.inline import inline, piece, smaller
from rkf.runtime.kernels.memory import load, prefetch
from rkf.runtime.kernels.simd import (
    bitcast,
    dot_bytes,
    merged_bits,
    permute_bytes,
    select,
    shifted_bytes,
    splat,
    transpose_words,
    zero_extend,
)
from rkf.runtime.kernels.vectors import I8x64, I16x8, I16x32, I32x8, I32x16, I64x8
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import ACTIVATION, BLOCK, LANES, MATRIX, PACKED_BLOCK_BYTES, ROUNDED, TILE_ROWS

_FEW, _FEW_ROUNDED = 32, 12  # tokens; up to this number few_avx512.py is faster
_ROUNDED_STEP_BYTES = BLOCK + BLOCK // ROUNDED * 4  # bytes, then multiples

# --- ranks to bytes


@inline
def _lookup(table, index):
    return permute_bytes(load(I8x64, table), index)


@inline
def _split_lookup(table, index, odd_rank):
    return select(odd_rank, _lookup(table + 64, index), _lookup(table, index))


@inline
def _quarter_lookup(table, index):
    """Look up in a table of 256 bytes; the two top bits of the rank choose the quarter."""
    top = bitcast(I8x64, bitcast(I16x32, index) >> 6) & ranks.constant(3)
    values = _lookup(table, index)
    for quarter in (1, 2, 3):
        values = select(top == ranks.constant(quarter), _lookup(table + 64 * quarter, index), values)
    return values


def _shifts(field: int, odd: int, to: int) -> int:
    """The shifts that bring field 2 i + odd of eight bytes, `field` bits wide, to bit `to` of byte i."""
    return sum(((2 * i + odd) * field - to) % 64 << 8 * i for i in range(8))


def _fields(width: int, at: int) -> Callable[..., Any]:
    """fields(plane, stride, row, column, ahead): even and odd fields of a plane of 1 or 2 bits, from bit `at` of each
    byte on; the other bits are undefined.
    """
    even_shifts, odd_shifts = _shifts(width, 0, at), _shifts(width, 1, at)
    sixteen = I16x8 if width == 1 else I32x8  # 16 columns to an element

    @inline
    def fields(plane, stride, row, column, ahead):
        address = plane + row * stride + (column * width >> 3)
        prefetch(address + (ahead * width >> 2), 3)
        data = bitcast(I8x64, zero_extend(I64x8, load(sixteen, address)))
        even, odd = splat(I64x8, types.int64(even_shifts)), splat(I64x8, types.int64(odd_shifts))
        return shifted_bytes(data, bitcast(I8x64, even)), shifted_bytes(data, bitcast(I8x64, odd))

    return fields


_PAIRS, _PAIRS_AT_4 = _fields(2, 0), _fields(2, 4)
_BITS_AT_2, _BITS_AT_4 = _fields(1, 2), _fields(1, 4)


@inline
def _above(low, count, high):
    """The low `count` bits of `low`, the others of `high`."""
    return merged_bits(ranks.constant((1 << count) - 1), low, high)


@inline
def _weights1(m, table, row, column):
    even, odd = ranks.bits(m.plane0, m.stride0, row, column, m.ahead)
    zero, one = load(I8x64, table), load(I8x64, table + 64)
    return select(even, one, zero), select(odd, one, zero)


@inline
def _weights2(m, table, row, column):
    even, odd = _PAIRS(m.plane0, m.stride0, row, column, m.ahead)
    return _lookup(table, even), _lookup(table, odd)


@inline
def _weights3(m, table, row, column):
    even, odd = _PAIRS(m.plane0, m.stride0, row, column, m.ahead)
    low_even, low_odd = _BITS_AT_2(m.plane1, m.stride1, row, column, m.ahead)
    return _lookup(table, _above(even, 2, low_even)), _lookup(table, _above(odd, 2, low_odd))


@inline
def _weights4(m, table, row, column):
    even, odd = ranks.nibbles(m.plane0, m.stride0, row, column, m.ahead)
    return _lookup(table, even), _lookup(table, odd)


@inline
def _weights5(m, table, row, column):
    even, odd = ranks.nibbles(m.plane0, m.stride0, row, column, m.ahead)
    low_even, low_odd = _BITS_AT_4(m.plane1, m.stride1, row, column, m.ahead)
    return _lookup(table, _above(even, 4, low_even)), _lookup(table, _above(odd, 4, low_odd))


@inline
def _six_bits(m, row, column):
    even, odd = ranks.nibbles(m.plane0, m.stride0, row, column, m.ahead)
    low_even, low_odd = _PAIRS_AT_4(m.plane1, m.stride1, row, column, m.ahead)
    return _above(even, 4, low_even), _above(odd, 4, low_odd)


@inline
def _weights6(m, table, row, column):
    even, odd = _six_bits(m, row, column)
    return _lookup(table, even), _lookup(table, odd)


@inline
def _weights7(m, table, row, column):
    even, odd = _six_bits(m, row, column)
    even_bit, odd_bit = ranks.bits(m.plane2, m.stride2, row, column, m.ahead)
    return _split_lookup(table, even, even_bit), _split_lookup(table, odd, odd_bit)


@inline
def _weights8(m, table, row, column):
    even, odd = ranks.ranks8(m, row, column)
    return _quarter_lookup(table, even), _quarter_lookup(table, odd)


WEIGHTS = {
    "1": _weights1,
    "2": _weights2,
    "3": _weights3,
    "4": _weights4,
    "5": _weights5,
    "6": _weights6,
    "7": _weights7,
    "8": _weights8,
    **products.IDENTITIES,
}


# --- one token


SUMS = products.two_digits(I8x64, I32x16, dot_bytes)


def multiply_one(width: str) -> Callable[..., Any]:
    """products.multiply_one for a width of WEIGHTS. Eight rows at a time of several planes do not fit the registers."""
    planes = len(plane_bits(int(width[0])))
    return products.multiply_one(WEIGHTS[width], SUMS._replace(rows=8 if planes == 1 else 4))


# --- many tokens


@inline
def _panel_step(total, w0, w1, x):
    """Four products of four columns: two panels of 16 rows, with a token's high and low bytes."""
    high = bitcast(I8x64, splat(I32x16, load(types.int32, x)))
    low = bitcast(I8x64, splat(I32x16, load(types.int32, x + BLOCK)))
    return (
        dot_bytes(total[0], w0, high),
        dot_bytes(total[1], w1, high),
        dot_bytes(total[2], w0, low),
        dot_bytes(total[3], w1, low),
    )


@inline
def _four_tokens(panels, panel_bytes, packed, stride, token, last):
    """Totals of 32 rows for tokens token … token + 3 (past the end, the last token repeats)."""
    x0, x1 = packed + token * stride, packed + smaller(token + 1, last) * stride
    x2, x3 = packed + smaller(token + 2, last) * stride, packed + smaller(token + 3, last) * stride
    zero = splat(I32x16, types.int32(0))
    t0 = t1 = t2 = t3 = (zero, zero, zero, zero)
    for block in range(panel_bytes // (BLOCK * LANES)):
        weights, offset = panels + block * BLOCK * LANES, block * PACKED_BLOCK_BYTES
        for _ in range(BLOCK // 4):
            w0, w1 = load(I8x64, weights), load(I8x64, weights + panel_bytes)
            t0 = _panel_step(t0, w0, w1, x0 + offset)
            t1 = _panel_step(t1, w0, w1, x1 + offset)
            t2 = _panel_step(t2, w0, w1, x2 + offset)
            t3 = _panel_step(t3, w0, w1, x3 + offset)
            weights += 64
            offset += 4
    return _whole(t0), _whole(t1), _whole(t2), _whole(t3)


@inline
def _whole(total):
    return (total[0] << 7) + total[2], (total[1] << 7) + total[3]


@inline
def _rounded_step(total, w0, w1, x):
    """Two products of four columns: two panels of 16 rows, with a token's bytes."""
    four = bitcast(I8x64, splat(I32x16, load(types.int32, x)))
    return dot_bytes(total[0], w0, four), dot_bytes(total[1], w1, four)


@inline
def _add_multiple(total, part, multiple):
    factor = splat(I32x16, load(types.int32, multiple))
    return total[0] + part[0] * factor, total[1] + part[1] * factor


@inline
def _four_tokens_rounded(panels, panel_bytes, x, token, last):
    """`_four_tokens` of rounded activations: sums over 32 columns, times their multiple."""
    base, stride = x.packed + x.rounded, x.packed_stride
    x0, x1 = base + token * stride, base + smaller(token + 1, last) * stride
    x2, x3 = base + smaller(token + 2, last) * stride, base + smaller(token + 3, last) * stride
    zero = splat(I32x16, types.int32(0))
    t0 = t1 = t2 = t3 = (zero, zero)
    for block in range(panel_bytes // (BLOCK * LANES)):
        for group in range(BLOCK // ROUNDED):
            p0 = p1 = p2 = p3 = (zero, zero)
            for half in range(2):  # even columns, then odd ones
                weights = panels + block * BLOCK * LANES + half * BLOCK // 2 * LANES + group * ROUNDED // 2 * LANES
                offset = block * _ROUNDED_STEP_BYTES + half * BLOCK // 2 + group * ROUNDED // 2
                for _ in range(ROUNDED // 8):
                    w0, w1 = load(I8x64, weights), load(I8x64, weights + panel_bytes)
                    p0 = _rounded_step(p0, w0, w1, x0 + offset)
                    p1 = _rounded_step(p1, w0, w1, x1 + offset)
                    p2 = _rounded_step(p2, w0, w1, x2 + offset)
                    p3 = _rounded_step(p3, w0, w1, x3 + offset)
                    weights += 64
                    offset += 4
            multiple = block * _ROUNDED_STEP_BYTES + BLOCK + group * 4
            t0, t1 = _add_multiple(t0, p0, x0 + multiple), _add_multiple(t1, p1, x1 + multiple)
            t2, t3 = _add_multiple(t2, p2, x2 + multiple), _add_multiple(t3, p3, x3 + multiple)
    return t0, t1, t2, t3


@inline
def _store_token(total, m, x, token, y, row, last, digit):
    """Store a token's totals of two panels, rows row … last."""
    products.store_rows(total[0], m, x, token, y, row, smaller(last + 1 - row, LANES), digit)
    if row + LANES <= last:
        products.store_rows(
            total[1], m, x, token, y + LANES * 4, row + LANES, smaller(last + 1 - row - LANES, LANES), digit
        )


def multiply_many(weights: Callable[..., Any]) -> Callable[..., Any]:
    """y[token, row] for many tokens: 32 rows are decoded to bytes once, then multiplied with four tokens at a time.

    Up to 32 tokens use few_avx512.py instead: for so few products, transposing rows into panels is too much work.
    Scratch holds the rows, then two panels of [columns / 4, 16 rows, 4 columns], so that lanes are rows.
    """

    sixteen_rows, decode = few_avx512.sixteen_rows(weights), products.row_decoder(weights, I8x64)

    @piece
    def decode_panels(m, row, last, digit, scratch, panels, panel_bytes):
        decode(m, row, last + 1 - row, digit, scratch)
        stride = panel_bytes // LANES
        for panel in range(TILE_ROWS // LANES):
            rows, target = scratch + panel * LANES * stride, panels + panel * panel_bytes
            for offset in range(0, stride, 64):
                transpose_words(rows + offset, stride, target + offset * LANES)

    @inline
    def few(m, x, tokens, y, y_stride, low, high, scratch):
        for row in range(low, high, few_avx512.ROWS):
            count = smaller(high - row, few_avx512.ROWS)
            for digit in range(m.digits):
                sixteen_rows(m, x, tokens, row, high - 1, digit, scratch)
                for token in range(tokens):
                    total = load(I32x16, scratch + token * few_avx512.SUM_BYTES)
                    products.store_rows(total, m, x, token, y + token * y_stride + row * 4, row, count, digit)

    def kernel(matrix, activation, tokens, y, y_stride, low, high, scratch):
        m, x = view(MATRIX, matrix), view(ACTIVATION, activation)
        limit = _FEW if x.rounded == 0 else _FEW_ROUNDED
        if tokens <= limit:
            few(m, x, tokens, y, y_stride, low, high, scratch)
            return
        panel_bytes = (m.columns + BLOCK - 1) // BLOCK * BLOCK * LANES
        panels, share = scratch + TILE_ROWS // LANES * panel_bytes, (4 * TILE_ROWS + tokens - 1) // tokens
        for row in range(low, high, TILE_ROWS):
            last = smaller(high, row + TILE_ROWS) - 1
            for digit in range(m.digits):
                decode_panels(m, row, last, digit, scratch, panels, panel_bytes)
                ahead, until = row + TILE_ROWS, smaller(row + 2 * TILE_ROWS, high)
                for token in range(0, tokens, 4):
                    few_avx512.fetch_rows(m, ahead, smaller(ahead + share, until))
                    ahead += share
                    if x.rounded != 0:
                        t0, t1, t2, t3 = _four_tokens_rounded(panels, panel_bytes, x, token, tokens - 1)
                    else:
                        t0, t1, t2, t3 = _four_tokens(panels, panel_bytes, x.packed, x.packed_stride, token, tokens - 1)
                    out = y + token * y_stride + row * 4
                    _store_token(t0, m, x, token, out, row, last, digit)
                    if token + 1 < tokens:
                        _store_token(t1, m, x, token + 1, out + y_stride, row, last, digit)
                    if token + 2 < tokens:
                        _store_token(t2, m, x, token + 2, out + 2 * y_stride, row, last, digit)
                    if token + 3 < tokens:
                        _store_token(t3, m, x, token + 3, out + 3 * y_stride, row, last, digit)

    return kernel
