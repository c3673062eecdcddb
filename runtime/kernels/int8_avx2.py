"""Fast products on AVX2: vpshufb looks ranks up in tables of 16, vpmaddwd multiplies the values as 16-bit numbers.

Rounded activations of one token are multiplied as bytes, by vpmaddubsw: 32 weights then take four instructions after
the lookup, where words take six. Two digits of other activations would take seven.
A step covers 64 columns, in two registers of 32 bytes: even columns and odd ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels import packing, products
from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.instructions import dot_byte_pairs, dot_pairs, permute_16
from rkf.runtime.kernels.memory import load, prefetch
from rkf.runtime.kernels.simd import any_bit, bitcast, lane_sum, lane_sums, repeat_lanes, select, splat, zero_extend
from rkf.runtime.kernels.vectors import I8x8, I8x16, I8x32, I16x16, I32x8
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import ACTIVATION, MATRIX

# --- planes to registers of ranks, as in ranks.py


@inline
def _constant(byte):
    return splat(I8x32, types.int8(byte))


@inline
def _words(values):
    return bitcast(I16x16, values)


@inline
def _shifted(values, count):
    """Whole 16-bit lanes to the left, so bits come in from the neighbouring byte."""
    return bitcast(I8x32, _words(values) << count)


@inline
def _nibbles(plane, stride, row, column, ahead):
    address = plane + row * stride + (column >> 1)
    prefetch(address + ahead, 3)
    both = load(I8x32, address)
    return both & _constant(15), bitcast(I8x32, _words(both) >> 4) & _constant(15)


@inline
def _quads(plane, stride, row, column, ahead):
    """Words with the ranks of columns 4 i and 4 i + 1 from bit 0 on, of 4 i + 2 and 4 i + 3 from bit 8 on; the other
    bits are undefined.
    """
    address = plane + row * stride + (column >> 2)
    prefetch(address + (ahead >> 1), 3)
    quads = zero_extend(I16x16, load(I8x16, address))
    return quads | (quads << 4)


@inline
def _pairs(plane, stride, row, column, ahead):
    """Ranks of two bits, without undefined bits."""
    quads = _quads(plane, stride, row, column, ahead)
    return bitcast(I8x32, quads) & _constant(3), bitcast(I8x32, quads >> 2) & _constant(3)


@inline
def _high_pairs(plane, stride, row, column, ahead):
    """Ranks in the high two bits of each byte; the others are undefined."""
    quads = _quads(plane, stride, row, column, ahead)
    return bitcast(I8x32, quads << 6), bitcast(I8x32, quads << 4)


@inline
def _bits(plane, stride, row, column, ahead):
    """A byte of ones for each bit that is set."""
    address = plane + row * stride + (column >> 3)
    prefetch(address + (ahead >> 2), 3)
    spread = repeat_lanes(I8x32, load(I8x8, address))
    return _set(spread, _four_bytes(0x40100401)), _set(spread, _four_bytes(0x80200802 - (1 << 32)))


@inline
def _four_bytes(value):
    return bitcast(I8x32, splat(I32x8, types.int32(value)))


@inline
def _set(values, bits):
    """A byte of ones where the one bit is set."""
    return select(any_bit(values, bits), _constant(-1), _constant(0))


# --- ranks to bytes. A table of 16 bytes is stored twice, to fill a register. A wider table is one table for each value
# of the bits below the first plane. Their highest bits choose: that is all that vpblendvb looks at.


@inline
def _chosen(bit, one, zero):
    return select(bit < _constant(0), one, zero)


@inline
def _lookup(table, index):
    """index: without undefined bits."""
    return permute_16(load(I8x32, table), index)


@inline
def _lookup2(table, index, bits):
    return _chosen(bits, _lookup(table + 32, index), _lookup(table, index))


@inline
def _lookup4(table, index, bits):
    low = _shifted(bits, 1)
    return _chosen(bits, _lookup2(table + 64, index, low), _lookup2(table, index, low))


@inline
def _lookup8(table, index, bits):
    low = _shifted(bits, 1)
    return _chosen(bits, _lookup4(table + 128, index, low), _lookup4(table, index, low))


@inline
def _lookup16(table, index, bits):
    low = _shifted(bits, 1)
    return _chosen(bits, _lookup8(table + 256, index, low), _lookup8(table, index, low))


@inline
def _weights1(m, table, row, column):
    even, odd = _bits(m.plane0, m.stride0, row, column, m.ahead)
    zero = _constant(0)
    return _lookup2(table, zero, even), _lookup2(table, zero, odd)


@inline
def _weights2(m, table, row, column):
    even, odd = _pairs(m.plane0, m.stride0, row, column, m.ahead)
    return _lookup(table, even), _lookup(table, odd)


@inline
def _weights3(m, table, row, column):
    even, odd = _pairs(m.plane0, m.stride0, row, column, m.ahead)
    even_bit, odd_bit = _bits(m.plane1, m.stride1, row, column, m.ahead)
    return _lookup2(table, even, even_bit), _lookup2(table, odd, odd_bit)


@inline
def _weights4(m, table, row, column):
    even, odd = _nibbles(m.plane0, m.stride0, row, column, m.ahead)
    return _lookup(table, even), _lookup(table, odd)


@inline
def _weights5(m, table, row, column):
    even, odd = _nibbles(m.plane0, m.stride0, row, column, m.ahead)
    even_bit, odd_bit = _bits(m.plane1, m.stride1, row, column, m.ahead)
    return _lookup2(table, even, even_bit), _lookup2(table, odd, odd_bit)


@inline
def _weights6(m, table, row, column):
    even, odd = _nibbles(m.plane0, m.stride0, row, column, m.ahead)
    low_even, low_odd = _high_pairs(m.plane1, m.stride1, row, column, m.ahead)
    return _lookup4(table, even, low_even), _lookup4(table, odd, low_odd)


@inline
def _grouped(table, group, pair):
    """Values in groups of four: the first of a group, and the distance from it, of which the group has one of four
    kinds. pair: the place in the group.
    """
    return _lookup(table, group) + _lookup(table + 64, _lookup(table + 32, group) | pair)


@inline
def _grouped6(m, table, row, column):
    even, odd = _nibbles(m.plane0, m.stride0, row, column, m.ahead)
    low_even, low_odd = _pairs(m.plane1, m.stride1, row, column, m.ahead)
    return _grouped(table, even, low_even), _grouped(table, odd, low_odd)


@inline
def _with_bit(pair, bit):
    """Three bits at the top of each byte: the pair's, then the bit."""
    return (pair & _constant(-64)) | (bit & _constant(32))


@inline
def _weights7(m, table, row, column):
    even, odd = _nibbles(m.plane0, m.stride0, row, column, m.ahead)
    low_even, low_odd = _high_pairs(m.plane1, m.stride1, row, column, m.ahead)
    even_bit, odd_bit = _bits(m.plane2, m.stride2, row, column, m.ahead)
    return _lookup8(table, even, _with_bit(low_even, even_bit)), _lookup8(table, odd, _with_bit(low_odd, odd_bit))


@inline
def _weights8(m, table, row, column):
    even, odd = _nibbles(m.plane0, m.stride0, row, column, m.ahead)
    low_even, low_odd = _nibbles(m.plane1, m.stride1, row, column, m.ahead)
    return _lookup16(table, even, _shifted(low_even, 4)), _lookup16(table, odd, _shifted(low_odd, 4))


@inline
def _identity7(m, table, row, column):
    """The rank itself: the nibble, the pair and the bit, side by side."""
    even, odd = _nibbles(m.plane0, m.stride0, row, column, m.ahead)
    low_even, low_odd = _pairs(m.plane1, m.stride1, row, column, m.ahead)
    even_bit, odd_bit = _bits(m.plane2, m.stride2, row, column, m.ahead)
    # The mask of a set bit is -1.
    return (
        _shifted(even, 3) + _shifted(low_even, 1) - even_bit,
        _shifted(odd, 3) + _shifted(low_odd, 1) - odd_bit,
    )


@inline
def _identity8(m, table, row, column):
    even, odd = _nibbles(m.plane0, m.stride0, row, column, m.ahead)
    low_even, low_odd = _nibbles(m.plane1, m.stride1, row, column, m.ahead)
    return _shifted(even, 4) | low_even, _shifted(odd, 4) | low_odd


WEIGHTS = {
    "1": _weights1,
    "2": _weights2,
    "3": _weights3,
    "4": _weights4,
    "5": _weights5,
    "6": _weights6,
    "6g": _grouped6,
    "7": _weights7,
    "8": _weights8,
    "7i": _identity7,
    "8i": _identity8,
}


# --- sums


@inline
def _zero():
    return splat(I32x8, types.int32(0))


@inline
def _address(step):
    return step


@inline
def _add_register(total, values, x):
    """Bytes to words by a mask and a shift: vpmovzxbw would compete with vpshufb for one port."""
    words = _words(values)
    first = dot_pairs(words & splat(I16x16, types.int16(255)), load(I16x16, x))
    return total + (first + dot_pairs(words >> 8, load(I16x16, x + 32)))


@inline
def _add(total, even, odd, x):
    return _add_register(_add_register(total, even, x), odd, x + 64)


SUMS = products.Sums(I8x32, _zero, _address, _add, lane_sums)


@inline
def _rounded(step):
    """Magnitudes of even and of odd columns, their signs, and the multiples (packing.py)."""
    signs = load(I8x32, step + 64), load(I8x32, step + 96)
    return load(I8x32, step), load(I8x32, step + 32), signs[0], signs[1], load(I16x16, step + 128)


@inline
def _add_rounded(total, even, odd, x):
    """vpmaddubsw wants one factor without a sign, so the weights take the sign of the activations: value + 128 becomes
    the value by its highest bit, and -1 - value by all its bits where the activation is negative. Sums of two products
    stay within 2 * 127 * 128.
    """
    first = dot_pairs(dot_byte_pairs(x[0], even ^ x[2]), x[4])
    return total + (first + dot_pairs(dot_byte_pairs(x[1], odd ^ x[3]), x[4]))


ROUNDED_SUMS = products.Sums(I8x32, _zero, _rounded, _add_rounded, lane_sums, step_bytes=packing.ROUNDED_AVX2_BYTES)


@inline
def _sum_of_negatives(m, packed):
    """What the products of rounded activations add in excess: the sum of those below zero, as for a row of zeros."""
    total, zero = _zero(), _constant(-128)
    for step in range((m.end + 63) // 64):
        total = _add_rounded(total, zero, zero, _rounded(packed + step * packing.ROUNDED_AVX2_BYTES))
    return lane_sum(total)


def multiply_one(width: str) -> Callable[..., Any]:
    """products.multiply_one for a width of WEIGHTS, with less arithmetic for rounded activations.

    Tables of 64 values and more leave no registers for the totals of eight rows. Two at a time would not spill either,
    but of long rows they push the activations out of the first-level cache.
    """
    weights, rows = WEIGHTS[width], 8 if int(width[0]) < 6 else 4
    exact = products.one_token(weights, SUMS._replace(rows=rows))
    rounded = products.one_token(weights, ROUNDED_SUMS._replace(rows=rows))

    def kernel(matrix, activation, tokens, y, y_stride, low, high, scratch):
        m, x = view(MATRIX, matrix), view(ACTIVATION, activation)
        total = load(types.int32, x.total)
        if x.rounded != 0:
            packed = x.packed + x.rounded
            correction = (m.offset + 128) * total - _sum_of_negatives(m, packed)
            rounded(m, packed, y, low, high, correction)
        else:
            exact(m, x.packed, y, low, high, m.offset * total)
        products.scale_rows(m, x, types.int64(0), y, low, high)

    return kernel
