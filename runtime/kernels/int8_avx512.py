"""Fast products on AVX-512 (VBMI, VNNI, BMI2): 128 weights a step from the mapped planes, in whole numbers.

A plane byte holds even columns in its low fields and odd columns in its high ones, so each step yields two registers of
ranks, columns 0, 2, 4, … and 1, 3, 5, …; activations are packed in the same order (activations.py). vpermb turns ranks
into bytes c + 128, vpdpbusd sums them with the activations' high and low bytes. Sums are exact in int32 (layout.py), so
every other CPU's kernel gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels.inline import inline, larger, piece, smaller
from rkf.runtime.kernels.simd import (
    MASK64,
    F32x8,
    F32x16,
    I8x8,
    I8x32,
    I8x64,
    I16x32,
    I32x8,
    I32x16,
    bitcast,
    dot_bytes,
    extract_bits,
    lane_sums,
    load,
    load_first,
    mask_of,
    permute_bytes,
    prefetch,
    select,
    splat,
    store,
    store_first,
    store_lanes,
    to_float,
    transpose_words,
    zero_extend,
)
from rkf.runtime.kernels.views import view
from rkf.runtime.layout import ACTIVATION, BLOCK, LANES, MATRIX, PACKED_BLOCK_BYTES, TILE_ROWS

# Each stream asks for the bytes that it reads two short rows later: without, matrices in the outer caches or memory
# take half as long again (docs/log.md). A prefetch past a plane does not fault.
_AHEAD = 640
_EVEN, _ODD = 0x5555555555555555, -0x5555555555555556  # 0xAAAA… as int64


# --- one block of a plane: two registers (even columns, odd columns), valid in their low bits only


@inline
def _nibbles(plane, stride, row, block, columns):
    address = plane + row * stride + block * 64
    prefetch(address + _AHEAD, 3)
    both = load_first(I8x64, address, (columns + 1) >> 1)
    return both, bitcast(I8x64, bitcast(I16x32, both) >> 4)


@inline
def _pairs(plane, stride, row, block, columns):
    # Byte b holds columns 4b … 4b+3; in a 16-bit lane, b | b << 4 has columns 4b and 4b+2 at the bottom of its two
    # bytes.
    address = plane + row * stride + block * 32
    prefetch(address + _AHEAD // 2, 3)
    quads = zero_extend(I16x32, load_first(I8x32, address, (columns + 3) >> 2))
    both = quads | (quads << 4)
    return bitcast(I8x64, both), bitcast(I8x64, both >> 2)


@inline
def _bits(plane, stride, row, block, columns):
    address, count = plane + row * stride + block * 16, (columns + 7) >> 3
    prefetch(address + _AHEAD // 4, 3)
    low = bitcast(types.int64, load_first(I8x8, address, smaller(count, 8)))
    high = bitcast(types.int64, load_first(I8x8, address + 8, larger(count - 8, 0)))
    even = extract_bits(low, _EVEN) | (extract_bits(high, _EVEN) << 32)
    odd = extract_bits(low, _ODD) | (extract_bits(high, _ODD) << 32)
    return mask_of(MASK64, even), mask_of(MASK64, odd)


@inline
def _merge(high, low, low_bits):
    """Ranks whose low bits are those of `low` and whose rest are those of `high << low_bits`."""
    mask = splat(I8x64, types.int8((1 << low_bits) - 1))
    shifted = bitcast(I8x64, bitcast(I16x32, high) << low_bits)
    return (low & mask) | (shifted & (mask ^ splat(I8x64, types.int8(-1))))


# --- one block of weights: bytes of even columns, bytes of odd ones. Tables repeat, so that junk bits above do no harm.


@inline
def _weights1(m, table, row, block, columns):
    even, odd = _bits(m.plane0, m.stride0, row, block, columns)
    zero, one = load(I8x64, table), load(I8x64, table + 64)
    return select(even, one, zero), select(odd, one, zero)


@inline
def _weights2(m, table, row, block, columns):
    even, odd = _pairs(m.plane0, m.stride0, row, block, columns)
    values = load(I8x64, table)
    return permute_bytes(values, even), permute_bytes(values, odd)


@inline
def _split_lookup(table, ranks, mask):
    """The table's first half holds the values of even ranks, the second those of odd ranks; mask is the rank's lowest
    bit.
    """
    return select(mask, permute_bytes(load(I8x64, table + 64), ranks), permute_bytes(load(I8x64, table), ranks))


@inline
def _weights3(m, table, row, block, columns):
    even, odd = _pairs(m.plane0, m.stride0, row, block, columns)
    even_bit, odd_bit = _bits(m.plane1, m.stride1, row, block, columns)
    return _split_lookup(table, even, even_bit), _split_lookup(table, odd, odd_bit)


@inline
def _weights4(m, table, row, block, columns):
    even, odd = _nibbles(m.plane0, m.stride0, row, block, columns)
    values = load(I8x64, table)
    return permute_bytes(values, even), permute_bytes(values, odd)


@inline
def _weights5(m, table, row, block, columns):
    even, odd = _nibbles(m.plane0, m.stride0, row, block, columns)
    even_bit, odd_bit = _bits(m.plane1, m.stride1, row, block, columns)
    return _split_lookup(table, even, even_bit), _split_lookup(table, odd, odd_bit)


@inline
def _ranks6(m, row, block, columns):
    even, odd = _nibbles(m.plane0, m.stride0, row, block, columns)
    low_even, low_odd = _pairs(m.plane1, m.stride1, row, block, columns)
    return _merge(even, low_even, 2), _merge(odd, low_odd, 2)


@inline
def _weights6(m, table, row, block, columns):
    even, odd = _ranks6(m, row, block, columns)
    values = load(I8x64, table)
    return permute_bytes(values, even), permute_bytes(values, odd)


@inline
def _weights7(m, table, row, block, columns):
    even, odd = _ranks6(m, row, block, columns)
    even_bit, odd_bit = _bits(m.plane2, m.stride2, row, block, columns)
    return _split_lookup(table, even, even_bit), _split_lookup(table, odd, odd_bit)


@inline
def _identity7(m, table, row, block, columns):
    even, odd = _ranks6(m, row, block, columns)
    even_bit, odd_bit = _bits(m.plane2, m.stride2, row, block, columns)
    mask, zero, one = splat(I8x64, types.int8(63)), splat(I8x64, types.int8(0)), splat(I8x64, types.int8(1))
    even, odd = even & mask, odd & mask
    return even + even + select(even_bit, one, zero), odd + odd + select(odd_bit, one, zero)


@inline
def _identity8(m, table, row, block, columns):
    even, odd = _nibbles(m.plane0, m.stride0, row, block, columns)
    low_even, low_odd = _nibbles(m.plane1, m.stride1, row, block, columns)
    return _merge(even, low_even, 4), _merge(odd, low_odd, 4)


@inline
def _quarter_lookup(table, ranks):
    """A table of 256 bytes, by the two top bits of the rank."""
    top = bitcast(I8x64, bitcast(I16x32, ranks) >> 6) & splat(I8x64, types.int8(3))
    values = permute_bytes(load(I8x64, table), ranks)
    for quarter in (1, 2, 3):
        found = permute_bytes(load(I8x64, table + 64 * quarter), ranks)
        values = select(top == splat(I8x64, types.int8(quarter)), found, values)
    return values


@inline
def _weights8(m, table, row, block, columns):
    even, odd = _identity8(m, table, row, block, columns)
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
    "7i": _identity7,
    "8i": _identity8,
}


# --- products


@inline
def _activations(packed, block):
    """Even high, odd high, even low, odd low: i8[64] each."""
    address = packed + block * PACKED_BLOCK_BYTES
    return load(I8x64, address), load(I8x64, address + 64), load(I8x64, address + 128), load(I8x64, address + 192)


@inline
def _dot(total, even, odd, x):
    high, low = total
    high = dot_bytes(dot_bytes(high, even, x[0]), odd, x[1])
    low = dot_bytes(dot_bytes(low, even, x[2]), odd, x[3])
    return high, low


@inline
def _joined(total):
    high, low = total
    return (high << 7) + low


def multiply_one(weights: Callable[..., Any]) -> Callable[..., Any]:
    """y[row] = row of the matrix times one token, as eight streams of consecutive rows. See layout.py for the
    structs.
    """

    @inline
    def step(total, m, table, row, block, columns, x):
        even, odd = weights(m, table, row, block, columns)
        return _dot(total, even, odd, x)

    @inline
    def eight_rows(m, table, packed, row, apart, last):
        """Sums of rows row, row + apart, row + 2 apart, … (none past `last`)."""
        r1, r2, r3, r4 = row + apart, row + 2 * apart, row + 3 * apart, row + 4 * apart
        r1, r2, r3, r4 = smaller(r1, last), smaller(r2, last), smaller(r3, last), smaller(r4, last)
        r5, r6, r7 = smaller(row + 5 * apart, last), smaller(row + 6 * apart, last), smaller(row + 7 * apart, last)
        zero = splat(I32x16, types.int32(0))
        t0 = t1 = t2 = t3 = t4 = t5 = t6 = t7 = (zero, zero)
        blocks, rest = m.columns // BLOCK, m.columns % BLOCK
        for block in range(blocks):
            x = _activations(packed, block)
            t0 = step(t0, m, table, row, block, BLOCK, x)
            t1 = step(t1, m, table, r1, block, BLOCK, x)
            t2 = step(t2, m, table, r2, block, BLOCK, x)
            t3 = step(t3, m, table, r3, block, BLOCK, x)
            t4 = step(t4, m, table, r4, block, BLOCK, x)
            t5 = step(t5, m, table, r5, block, BLOCK, x)
            t6 = step(t6, m, table, r6, block, BLOCK, x)
            t7 = step(t7, m, table, r7, block, BLOCK, x)
        if rest > 0:
            x = _activations(packed, blocks)
            t0 = step(t0, m, table, row, blocks, rest, x)
            t1 = step(t1, m, table, r1, blocks, rest, x)
            t2 = step(t2, m, table, r2, blocks, rest, x)
            t3 = step(t3, m, table, r3, blocks, rest, x)
            t4 = step(t4, m, table, r4, blocks, rest, x)
            t5 = step(t5, m, table, r5, blocks, rest, x)
            t6 = step(t6, m, table, r6, blocks, rest, x)
            t7 = step(t7, m, table, r7, blocks, rest, x)
        return lane_sums(
            _joined(t0), _joined(t1), _joined(t2), _joined(t3), _joined(t4), _joined(t5), _joined(t6), _joined(t7)
        )

    @inline
    def streams(m, table, packed, y, low, high, correction):
        """y[row] = the whole-number sums of rows low … high - 1, as f32."""
        apart = (high - low + 7) // 8
        for i in range(apart):
            row = low + i
            sums = to_float(F32x8, eight_rows(m, table, packed, row, apart, high - 1) + correction)
            for digit in range(1, m.digits):
                lower = eight_rows(m, table + digit * m.table_bytes, packed, row, apart, high - 1) + correction
                sums = sums * splat(F32x8, types.float32(256)) + to_float(F32x8, lower)
            store_lanes(y + row * 4, apart * 4, sums, (high - row + apart - 1) // apart)

    def kernel(matrix, activation, tokens, y, y_stride, low, high, scratch):
        m, x = view(MATRIX, matrix), view(ACTIVATION, activation)
        x_total = load(types.int32, x.total)
        correction = splat(I32x8, types.int32(m.offset * x_total))
        row = low
        while row < high:
            index = row // m.rows_per_table
            end = smaller(high, (index + 1) * m.rows_per_table)
            streams(m, m.table + index * m.digits * m.table_bytes, x.packed, y, row, end, correction)
            row = end
        x_scale = splat(F32x16, load(types.float32, x.scale))
        x_sum = splat(F32x16, types.float32(x_total)) * x_scale
        for row in range(low, high, LANES):
            _scale_rows(m, x_scale, x_sum, y, row, smaller(high - row, LANES))

    return kernel


@inline
def _scale_rows(m, x_scale, x_sum, y, row, count):
    """The activations' scale and the row factors, on sixteen rows' whole-number sums."""
    sums = load_first(F32x16, y + row * 4, count) * x_scale * load(F32x16, m.scale + row * m.scale_step)
    if m.shift != 0:
        sums = sums + x_sum * load(F32x16, m.shift + row * m.shift_step)
    store_first(y + row * 4, sums, count)


# --- many tokens


@inline
def _panel_step(total, w0, w1, x):
    """Four products of four columns: two panels of 16 rows, a token's high and low bytes."""
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
    """Totals of 32 rows for tokens token … token + 3 (the last repeats itself)."""
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
    return t0, t1, t2, t3


@inline
def _store_rows(total, m, x, token, y, row, count, digit):
    """Sixteen rows' totals of a token to y: joined digits, then factors (as multiply_one rounds them)."""
    x_total = load(types.int32, x.total + token * 4)
    sums = to_float(F32x16, total + splat(I32x16, types.int32(m.offset * x_total)))
    if digit > 0:
        sums = load_first(F32x16, y, count) * splat(F32x16, types.float32(256)) + sums
    if digit == m.digits - 1:
        x_scale = splat(F32x16, load(types.float32, x.scale + token * 4))
        sums = sums * x_scale * load(F32x16, m.scale + row * m.scale_step)
        if m.shift != 0:
            x_sum = splat(F32x16, types.float32(x_total)) * x_scale
            sums = sums + x_sum * load(F32x16, m.shift + row * m.shift_step)
    store_first(y, sums, count)


@inline
def _store_token(total, m, x, token, y, row, last_row, digit):
    _store_rows((total[0] << 7) + total[2], m, x, token, y, row, smaller(last_row + 1 - row, LANES), digit)
    if row + LANES <= last_row:
        joined = (total[1] << 7) + total[3]
        second = row + LANES
        _store_rows(joined, m, x, token, y + LANES * 4, second, smaller(last_row + 1 - second, LANES), digit)


def multiply_many(weights: Callable[..., Any]) -> Callable[..., Any]:
    """y[token, row] for many tokens: 32 rows are decoded to bytes once, then multiplied with four tokens at a time.

    Scratch holds the rows, then two panels of [columns / 4, 16 rows, 4 columns], so that lanes are rows.
    """

    @piece
    def decode_tile(m, table, row, last, scratch, panels, panel_bytes):
        blocks, rest = m.columns // BLOCK, m.columns % BLOCK
        stride = (m.columns + BLOCK - 1) // BLOCK * BLOCK
        for i in range(TILE_ROWS):
            source, target = smaller(row + i, last), scratch + i * stride
            for block in range(blocks):
                even, odd = weights(m, table, source, block, BLOCK)
                store(target + block * BLOCK, even)
                store(target + block * BLOCK + 64, odd)
            if rest > 0:
                even, odd = weights(m, table, source, blocks, rest)
                store(target + blocks * BLOCK, even)
                store(target + blocks * BLOCK + 64, odd)
        for panel in range(TILE_ROWS // LANES):
            rows, target = scratch + panel * LANES * stride, panels + panel * panel_bytes
            for offset in range(0, stride, 64):
                transpose_words(rows + offset, stride, target + offset * LANES)

    def kernel(matrix, activation, tokens, y, y_stride, low, high, scratch):
        m, x = view(MATRIX, matrix), view(ACTIVATION, activation)
        panel_bytes = (m.columns + BLOCK - 1) // BLOCK * BLOCK * LANES
        panels = scratch + TILE_ROWS // LANES * panel_bytes
        row = low
        while row < high:
            index = row // m.rows_per_table
            last = smaller(smaller(high, (index + 1) * m.rows_per_table), row + TILE_ROWS) - 1
            for digit in range(m.digits):
                table = m.table + (index * m.digits + digit) * m.table_bytes
                decode_tile(m, table, row, last, scratch, panels, panel_bytes)
                for token in range(0, tokens, 4):
                    t0, t1, t2, t3 = _four_tokens(panels, panel_bytes, x.packed, x.packed_stride, token, tokens - 1)
                    out = y + token * y_stride + row * 4
                    _store_token(t0, m, x, token, out, row, last, digit)
                    if token + 1 < tokens:
                        _store_token(t1, m, x, token + 1, out + y_stride, row, last, digit)
                    if token + 2 < tokens:
                        _store_token(t2, m, x, token + 2, out + 2 * y_stride, row, last, digit)
                    if token + 3 < tokens:
                        _store_token(t3, m, x, token + 3, out + 3 * y_stride, row, last, digit)
            row = last + 1

    return kernel
