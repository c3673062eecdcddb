"""Fast products on AVX2: vpshufb looks ranks up in tables of 16, vpmaddwd multiplies the values as 16-bit numbers.

(vpmaddubsw multiplies bytes. With the sign moved to the activations and two digits of these, 32 weights take nine
instructions after the lookup. Words take six.)
A step covers 64 columns, in two registers of 32 bytes: even columns and odd ones.
"""

from __future__ import annotations

from numba import types

from rkf.runtime.kernels import products
from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.memory import load, prefetch
from rkf.runtime.kernels.simd import (
    any_bit,
    bitcast,
    dot_pairs,
    lane_sums,
    permute_16,
    repeat_lanes,
    select,
    splat,
    zero_extend,
)
from rkf.runtime.kernels.vectors import I8x8, I8x16, I8x32, I16x16, I32x8

# --- planes to registers of ranks, as in ranks.py


@inline
def _constant(byte):
    return splat(I8x32, types.int8(byte))


@inline
def _words(values):
    return bitcast(I16x16, values)


@inline
def _nibbles(plane, stride, row, column, ahead):
    address = plane + row * stride + (column >> 1)
    prefetch(address + ahead, 3)
    both = load(I8x32, address)
    return both & _constant(15), bitcast(I8x32, _words(both) >> 4) & _constant(15)


@inline
def _pairs(plane, stride, row, column, ahead):
    """Ranks in the low two bits; the others are undefined."""
    address = plane + row * stride + (column >> 2)
    prefetch(address + (ahead >> 1), 3)
    quads = zero_extend(I16x16, load(I8x16, address))
    both = quads | (quads << 4)
    return bitcast(I8x32, both), bitcast(I8x32, both >> 2)


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


# --- ranks to bytes. A table of 16 bytes is stored twice, to fill a register. A wider table is one table for each set
# of the bits below the first plane. The value is the xor of the tables of all subsets of the bits that are set: two
# instructions a table, where a blend takes two or three.


@inline
def _lookup(table, index):
    """index: without undefined bits."""
    return permute_16(load(I8x32, table), index)


@inline
def _lookup2(table, index, bit0):
    return _lookup(table, index) ^ (_lookup(table + 32, index) & bit0)


@inline
def _lookup4(table, index, bit0, bit1):
    return _lookup2(table, index, bit0) ^ (_lookup2(table + 64, index, bit0) & bit1)


@inline
def _lookup8(table, index, bit0, bit1, bit2):
    return _lookup4(table, index, bit0, bit1) ^ (_lookup4(table + 128, index, bit0, bit1) & bit2)


@inline
def _pair_lookup(table, index, pair):
    return _lookup4(table, index, _set(pair, _constant(1)), _set(pair, _constant(2)))


@inline
def _triple_lookup(table, index, pair, bit):
    return _lookup8(table, index, bit, _set(pair, _constant(1)), _set(pair, _constant(2)))


@inline
def _lookup16(table, index, low):
    bit0, bit1, bit2 = _set(low, _constant(1)), _set(low, _constant(2)), _set(low, _constant(4))
    high = _lookup8(table + 256, index, bit0, bit1, bit2) & _set(low, _constant(8))
    return _lookup8(table, index, bit0, bit1, bit2) ^ high


@inline
def _weights1(m, table, row, column):
    even, odd = _bits(m.plane0, m.stride0, row, column, m.ahead)
    zero = _constant(0)
    return _lookup2(table, zero, even), _lookup2(table, zero, odd)


@inline
def _weights2(m, table, row, column):
    even, odd = _pairs(m.plane0, m.stride0, row, column, m.ahead)
    return _lookup(table, even & _constant(3)), _lookup(table, odd & _constant(3))


@inline
def _weights3(m, table, row, column):
    even, odd = _pairs(m.plane0, m.stride0, row, column, m.ahead)
    even_bit, odd_bit = _bits(m.plane1, m.stride1, row, column, m.ahead)
    return _lookup2(table, even & _constant(3), even_bit), _lookup2(table, odd & _constant(3), odd_bit)


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
    low_even, low_odd = _pairs(m.plane1, m.stride1, row, column, m.ahead)
    return _pair_lookup(table, even, low_even), _pair_lookup(table, odd, low_odd)


@inline
def _weights7(m, table, row, column):
    even, odd = _nibbles(m.plane0, m.stride0, row, column, m.ahead)
    low_even, low_odd = _pairs(m.plane1, m.stride1, row, column, m.ahead)
    even_bit, odd_bit = _bits(m.plane2, m.stride2, row, column, m.ahead)
    return _triple_lookup(table, even, low_even, even_bit), _triple_lookup(table, odd, low_odd, odd_bit)


@inline
def _weights8(m, table, row, column):
    even, odd = _nibbles(m.plane0, m.stride0, row, column, m.ahead)
    low_even, low_odd = _nibbles(m.plane1, m.stride1, row, column, m.ahead)
    return _lookup16(table, even, low_even), _lookup16(table, odd, low_odd)


@inline
def _shifted(values, count):
    """Whole 16-bit lanes to the left, so bits come in from the neighbouring byte."""
    return bitcast(I8x32, _words(values) << count)


@inline
def _identity7(m, table, row, column):
    """The rank itself: the nibble, the pair and the bit, side by side."""
    even, odd = _nibbles(m.plane0, m.stride0, row, column, m.ahead)
    low_even, low_odd = _pairs(m.plane1, m.stride1, row, column, m.ahead)
    even_bit, odd_bit = _bits(m.plane2, m.stride2, row, column, m.ahead)
    pair = _constant(6)
    # The mask of a set bit is -1.
    return (
        _shifted(even, 3) + (_shifted(low_even, 1) & pair) - even_bit,
        _shifted(odd, 3) + (_shifted(low_odd, 1) & pair) - odd_bit,
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
