"""Fast products on AVX2: vpshufb looks ranks up in tables of 16, vpmaddwd multiplies the values as 16-bit numbers.

(vpmaddubsw takes bytes, but it saturates.) A wider table is 2^n tables of 16; the n lowest bits of the rank choose one.
"""

from __future__ import annotations

from numba import types

from rkf.runtime.kernels import products, ranks
from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.memory import load
from rkf.runtime.kernels.simd import any_bit, dot_pairs, join, lane_sums, part, permute_16, select, splat, zero_extend
from rkf.runtime.kernels.vectors import I8x16, I8x32, I8x64, I16x16, I32x8

# --- ranks to bytes. A table of 16 bytes is stored twice, to fill a register.


@inline
def _lookup(table, index):
    """index: without undefined bits."""
    values = load(I8x32, table)
    return join(I8x64, permute_16(values, part(I8x32, index, 0)), permute_16(values, part(I8x32, index, 1)))


@inline
def _lookup2(table, index, bit0):
    return select(bit0, _lookup(table + 32, index), _lookup(table, index))


@inline
def _lookup4(table, index, bit0, bit1):
    return select(bit1, _lookup2(table + 64, index, bit0), _lookup2(table, index, bit0))


@inline
def _lookup8(table, index, bit0, bit1, bit2):
    return select(bit2, _lookup4(table + 128, index, bit0, bit1), _lookup4(table, index, bit0, bit1))


@inline
def _lookup16(table, index, low):
    """Look up by the four bits of `low`."""
    bit0, bit1, bit2 = (
        any_bit(low, ranks.constant(1)),
        any_bit(low, ranks.constant(2)),
        any_bit(low, ranks.constant(4)),
    )
    return select(
        any_bit(low, ranks.constant(8)),
        _lookup8(table + 256, index, bit0, bit1, bit2),
        _lookup8(table, index, bit0, bit1, bit2),
    )


@inline
def _nibbles(m, row, block, columns):
    even, odd = ranks.nibbles(m.plane0, m.stride0, row, block, columns)
    return even & ranks.constant(15), odd & ranks.constant(15)


@inline
def _weights1(m, table, row, block, columns):
    even, odd = ranks.bits(m.plane0, m.stride0, row, block, columns)
    zero = ranks.constant(0)
    return _lookup2(table, zero, even), _lookup2(table, zero, odd)


@inline
def _weights2(m, table, row, block, columns):
    even, odd = ranks.pairs(m.plane0, m.stride0, row, block, columns)
    return _lookup(table, even & ranks.constant(3)), _lookup(table, odd & ranks.constant(3))


@inline
def _weights3(m, table, row, block, columns):
    even, odd = ranks.pairs(m.plane0, m.stride0, row, block, columns)
    even_bit, odd_bit = ranks.bits(m.plane1, m.stride1, row, block, columns)
    even, odd = even & ranks.constant(3), odd & ranks.constant(3)
    return _lookup2(table, even, even_bit), _lookup2(table, odd, odd_bit)


@inline
def _weights4(m, table, row, block, columns):
    even, odd = _nibbles(m, row, block, columns)
    return _lookup(table, even), _lookup(table, odd)


@inline
def _weights5(m, table, row, block, columns):
    even, odd = _nibbles(m, row, block, columns)
    even_bit, odd_bit = ranks.bits(m.plane1, m.stride1, row, block, columns)
    return _lookup2(table, even, even_bit), _lookup2(table, odd, odd_bit)


@inline
def _pair_lookup(table, index, pair):
    return _lookup4(table, index, any_bit(pair, ranks.constant(1)), any_bit(pair, ranks.constant(2)))


@inline
def _weights6(m, table, row, block, columns):
    even, odd = _nibbles(m, row, block, columns)
    low_even, low_odd = ranks.pairs(m.plane1, m.stride1, row, block, columns)
    return _pair_lookup(table, even, low_even), _pair_lookup(table, odd, low_odd)


@inline
def _triple_lookup(table, index, pair, bit):
    return _lookup8(table, index, bit, any_bit(pair, ranks.constant(1)), any_bit(pair, ranks.constant(2)))


@inline
def _weights7(m, table, row, block, columns):
    even, odd = _nibbles(m, row, block, columns)
    low_even, low_odd = ranks.pairs(m.plane1, m.stride1, row, block, columns)
    even_bit, odd_bit = ranks.bits(m.plane2, m.stride2, row, block, columns)
    return _triple_lookup(table, even, low_even, even_bit), _triple_lookup(table, odd, low_odd, odd_bit)


@inline
def _weights8(m, table, row, block, columns):
    even, odd = _nibbles(m, row, block, columns)
    low_even, low_odd = ranks.nibbles(m.plane1, m.stride1, row, block, columns)
    return _lookup16(table, even, low_even), _lookup16(table, odd, low_odd)


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


# --- sums


@inline
def _zero():
    return splat(I32x8, types.int32(0))


@inline
def _address(block):
    return block


@inline
def _add_sixteen(total, values, x):
    return total + dot_pairs(zero_extend(I16x16, values), load(I16x16, x))


@inline
def _add_register(total, values, x):
    total = _add_sixteen(total, part(I8x16, values, 0), x)
    total = _add_sixteen(total, part(I8x16, values, 1), x + 32)
    total = _add_sixteen(total, part(I8x16, values, 2), x + 64)
    return _add_sixteen(total, part(I8x16, values, 3), x + 96)


@inline
def _add(total, even, odd, x):
    return _add_register(_add_register(total, even, x), odd, x + 128)


SUMS = products.Sums(_zero, _address, _add, lane_sums)
