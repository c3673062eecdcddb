"""Rank planes to registers of ranks, with plain vector operations that mean the same on every CPU.

A step covers 128 columns from `column` on, a multiple of 8; a row has them all (structs.py, `end_column`). A plane byte
holds even columns in its low fields and odd ones in its high fields, so each step yields two registers of 64 bytes:
columns 0, 2, 4, … and 1, 3, 5, …. Activations are packed in that order (packing.py). Bits above a rank are undefined
unless a docstring says otherwise.

Each plane is prefetched `ahead` bytes for every four bits of its fields; past its end that does not fault.
"""

from __future__ import annotations

from numba import types

from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.memory import load, prefetch
from rkf.runtime.kernels.simd import any_bit, bitcast, repeat_lanes, select, splat, zero_extend
from rkf.runtime.kernels.vectors import I8x16, I8x32, I8x64, I16x32, I32x16


@inline
def constant(byte):
    return splat(I8x64, types.int8(byte))


@inline
def _as_bytes(words):
    return bitcast(I8x64, words)


@inline
def _shifted_right(ranks, count):
    """Shifts whole 16-bit lanes, so undefined bits come in from the neighbouring byte."""
    return _as_bytes(bitcast(I16x32, ranks) >> count)


@inline
def nibbles(plane, stride, row, column, ahead):
    """A 4-bit plane: ranks in the low four bits."""
    address = plane + row * stride + (column >> 1)
    prefetch(address + ahead, 3)
    both = load(I8x64, address)
    return both, _shifted_right(both, 4)


@inline
def pairs(plane, stride, row, column, ahead):
    """A 2-bit plane: ranks in the low two bits."""
    address = plane + row * stride + (column >> 2)
    prefetch(address + (ahead >> 1), 3)
    # Byte b holds columns 4b … 4b+3. In a 16-bit lane, b | b << 4 has columns 4b and 4b+2 in the lowest bits of its two
    # bytes.
    quads = zero_extend(I16x32, load(I8x32, address))
    both = quads | (quads << 4)
    return _as_bytes(both), _as_bytes(both >> 2)


@inline
def bits(plane, stride, row, column, ahead):
    """A 1-bit plane: masks."""
    address = plane + row * stride + (column >> 3)
    prefetch(address + (ahead >> 2), 3)
    # Four lanes of each register share a byte. They test its bits 0, 2, 4, 6 (even columns) or 1, 3, 5, 7 (odd ones).
    spread = repeat_lanes(I8x64, load(I8x16, address))
    return any_bit(spread, _as_bytes(_words(0x40100401))), any_bit(spread, _as_bytes(_words(0x80200802 - (1 << 32))))


@inline
def _words(value):
    return splat(I32x16, types.int32(value))


@inline
def merged(high, low, low_bits):
    """(high << low_bits) | low. The undefined bits of `low` are cleared, those of `high` stay above."""
    mask = constant((1 << low_bits) - 1)
    return select_bits(mask, low, _as_bytes(bitcast(I16x32, high) << low_bits))


@inline
def select_bits(mask, a, b):
    """Bits of a where the mask is set, of b elsewhere."""
    return (a & mask) | (b & (mask ^ constant(-1)))


@inline
def ranks6(m, row, column):
    even, odd = nibbles(m.plane0, m.stride0, row, column, m.ahead)
    low_even, low_odd = pairs(m.plane1, m.stride1, row, column, m.ahead)
    return merged(even, low_even, 2), merged(odd, low_odd, 2)


@inline
def ranks7(m, row, column):
    """Without undefined bits."""
    even, odd = ranks6(m, row, column)
    even_bit, odd_bit = bits(m.plane2, m.stride2, row, column, m.ahead)
    even, odd = even & constant(63), odd & constant(63)
    zero, one = constant(0), constant(1)
    return even + even + select(even_bit, one, zero), odd + odd + select(odd_bit, one, zero)


@inline
def ranks8(m, row, column):
    even, odd = nibbles(m.plane0, m.stride0, row, column, m.ahead)
    low_even, low_odd = nibbles(m.plane1, m.stride1, row, column, m.ahead)
    return merged(even, low_even, 4), merged(odd, low_odd, 4)
