"""Ranks to bytes on AVX-512 (VBMI): vpermb looks up 64 ranks at once.

The index of a value in its table has the bits of the first plane lowest and those of later planes above them, because
so they need not be moved; runtime/matrices.py orders tables by it. Tables repeat to fill a register, so undefined bits
above an index do no harm. A table of 7 bits is two registers, for even and odd ranks: the 1-bit plane chooses between
them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from numba import types

from rkf.runtime.kernels import ranks
from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.instructions import merged_bits, permute_bytes, shifted_bytes
from rkf.runtime.kernels.memory import load, prefetch
from rkf.runtime.kernels.simd import any_bit, bitcast, select, splat, zero_extend
from rkf.runtime.kernels.vectors import I8x64, I16x8, I16x32, I32x8, I64x8

PANEL_PLANE_BYTES = 1024  # of a plane of 4 bits: 128 columns of 16 rows
PANEL_BYTES = 3 * PANEL_PLANE_BYTES


class PlaneFields(NamedTuple):
    """How the fields of a plane get into registers: for its number, a function of (source, row, column) -> registers of
    even and of odd columns.

    nibbles: fields of 4 bits. pairs, bits: of 2 bits and of one, from bit `at` of each byte on. Other bits are
    undefined. masks: fields of one bit as masks.
    """

    nibbles: Callable[[int], Callable[..., Any]]
    pairs: Callable[[int, int], Callable[..., Any]]
    bits: Callable[[int, int], Callable[..., Any]]
    masks: Callable[[int], Callable[..., Any]]


# --- 128 columns of one row of a matrix


@inline
def _plane0(m):
    return m.plane0, m.stride0


@inline
def _plane1(m):
    return m.plane1, m.stride1


@inline
def _plane2(m):
    return m.plane2, m.stride2


_PLANES = (_plane0, _plane1, _plane2)


def _shifts(width: int, odd: int, at: int, bytes_each: int) -> int:
    """The shifts that bring field 2 i + odd, `width` bits wide, of each `bytes_each` of eight bytes to bit `at` of byte
    i of as many.
    """
    each = (8 * (i - i % bytes_each) + (2 * (i % bytes_each) + odd) * width - at for i in range(8))
    return sum(shift % 64 << 8 * i for i, shift in enumerate(each))


@inline
def _shifted(data, shifts):
    return shifted_bytes(data, bitcast(I8x64, splat(I64x8, types.int64(shifts))))


def _row_nibbles(locality: int, number: int) -> Callable[..., Any]:
    plane = _PLANES[number]

    @inline
    def nibbles(m, row, column):
        start, stride = plane(m)
        address = start + row * stride + (column >> 1)
        prefetch(address + m.ahead, locality)
        both = load(I8x64, address)
        return both, bitcast(I8x64, bitcast(I16x32, both) >> 4)

    return nibbles


def _row_fields(locality: int, width: int) -> Callable[[int, int], Callable[..., Any]]:
    sixteen = I16x8 if width == 1 else I32x8  # 16 columns to an element

    def fields_of(number: int, at: int) -> Callable[..., Any]:
        plane, even, odd = _PLANES[number], _shifts(width, 0, at, 8), _shifts(width, 1, at, 8)

        @inline
        def fields(m, row, column):
            start, stride = plane(m)
            address = start + row * stride + (column * width >> 3)
            prefetch(address + (m.ahead * width >> 2), locality)
            data = bitcast(I8x64, zero_extend(I64x8, load(sixteen, address)))
            return _shifted(data, even), _shifted(data, odd)

        return fields

    return fields_of


def _row_masks(number: int) -> Callable[..., Any]:
    plane = _PLANES[number]

    @inline
    def masks(m, row, column):
        address, stride = plane(m)
        return ranks.bits(address, stride, row, column, m.ahead)

    return masks


# --- eight columns of sixteen rows: a panel has the planes of a block as columns of words (many_avx512.py), and `row`
# --- is the number of the eight columns


def _panel_nibbles(number: int) -> Callable[..., Any]:
    start = number * PANEL_PLANE_BYTES

    @inline
    def nibbles(panel, eight, _):
        both = load(I8x64, panel + start + eight * 64)
        return both, bitcast(I8x64, bitcast(I16x32, both) >> 4)

    return nibbles


def _panel_fields(width: int) -> Callable[[int, int], Callable[..., Any]]:
    in_word = 4 // width  # eight columns

    def fields_of(number: int, at: int) -> Callable[..., Any]:
        start, even, odd = number * PANEL_PLANE_BYTES, _shifts(width, 0, at, 4), _shifts(width, 1, at, 4)
        next_eight = 8 * width * 0x0101010101010101

        @inline
        def fields(panel, eight, _):
            data = load(I8x64, panel + start + (eight // in_word) * 64)
            later = eight % in_word * next_eight
            return _shifted(data, even + later), _shifted(data, odd + later)

        return fields

    return fields_of


def _panel_masks(number: int) -> Callable[..., Any]:
    bits = _panel_fields(1)(number, 0)

    @inline
    def masks(panel, eight, column):
        even, odd = bits(panel, eight, column)
        return any_bit(even, ranks.constant(1)), any_bit(odd, ranks.constant(1))

    return masks


# --- values


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


@inline
def _above(low, count, high):
    """The low `count` bits of `low`, the others of `high`."""
    return merged_bits(ranks.constant((1 << count) - 1), low, high)


@inline
def _appended(high, low, bit):
    """The four bits of `high`, then two of `low` and one."""
    six = ranks.merged(high, low, 2) & ranks.constant(63)
    return six + six + select(bit, ranks.constant(1), ranks.constant(0))


def _by_width(fields: PlaneFields) -> dict[str, Callable[..., Any]]:
    """weights(source, table, row, column) -> the values of even and of odd columns, for each width."""
    nibbles, low_nibbles, pairs, bits_at_2 = fields.nibbles(0), fields.nibbles(1), fields.pairs(0, 0), fields.bits(1, 2)
    bits_at_4, pairs_at_4, low_pairs = fields.bits(1, 4), fields.pairs(1, 4), fields.pairs(1, 0)
    masks, low_masks = fields.masks(0), fields.masks(2)

    @inline
    def weights1(source, table, row, column):
        even, odd = masks(source, row, column)
        zero, one = load(I8x64, table), load(I8x64, table + 64)
        return select(even, one, zero), select(odd, one, zero)

    @inline
    def weights2(source, table, row, column):
        even, odd = pairs(source, row, column)
        return _lookup(table, even), _lookup(table, odd)

    @inline
    def weights3(source, table, row, column):
        even, odd = pairs(source, row, column)
        low_even, low_odd = bits_at_2(source, row, column)
        return _lookup(table, _above(even, 2, low_even)), _lookup(table, _above(odd, 2, low_odd))

    @inline
    def weights4(source, table, row, column):
        even, odd = nibbles(source, row, column)
        return _lookup(table, even), _lookup(table, odd)

    @inline
    def weights5(source, table, row, column):
        even, odd = nibbles(source, row, column)
        low_even, low_odd = bits_at_4(source, row, column)
        return _lookup(table, _above(even, 4, low_even)), _lookup(table, _above(odd, 4, low_odd))

    @inline
    def six_bits(source, row, column):
        even, odd = nibbles(source, row, column)
        low_even, low_odd = pairs_at_4(source, row, column)
        return _above(even, 4, low_even), _above(odd, 4, low_odd)

    @inline
    def weights6(source, table, row, column):
        even, odd = six_bits(source, row, column)
        return _lookup(table, even), _lookup(table, odd)

    @inline
    def weights7(source, table, row, column):
        even, odd = six_bits(source, row, column)
        even_bit, odd_bit = low_masks(source, row, column)
        return _split_lookup(table, even, even_bit), _split_lookup(table, odd, odd_bit)

    @inline
    def ranks7(source, table, row, column):
        even, odd = nibbles(source, row, column)
        low_even, low_odd = low_pairs(source, row, column)
        even_bit, odd_bit = low_masks(source, row, column)
        return _appended(even, low_even, even_bit), _appended(odd, low_odd, odd_bit)

    @inline
    def ranks8(source, table, row, column):
        even, odd = nibbles(source, row, column)
        low_even, low_odd = low_nibbles(source, row, column)
        return ranks.merged(even, low_even, 4), ranks.merged(odd, low_odd, 4)

    @inline
    def weights8(source, table, row, column):
        even, odd = ranks8(source, table, row, column)
        return _quarter_lookup(table, even), _quarter_lookup(table, odd)

    looked_up = (weights1, weights2, weights3, weights4, weights5, weights6, weights7, weights8)
    # Centroids that are consecutive integers need no table, as in kernels/products.py.
    return {str(width): weights for width, weights in enumerate(looked_up, 1)} | {"7i": ranks7, "8i": ranks8}


def _of_rows(locality: int) -> dict[str, Callable[..., Any]]:
    """locality: 3 prefetches into the first-level cache, 2 into the second."""
    pairs, bits = _row_fields(locality, 2), _row_fields(locality, 1)
    return _by_width(PlaneFields(partial(_row_nibbles, locality), pairs, bits, _row_masks))


WEIGHTS, FAR_WEIGHTS = _of_rows(3), _of_rows(2)
PANEL_WEIGHTS = _by_width(PlaneFields(_panel_nibbles, _panel_fields(2), _panel_fields(1), _panel_masks))
