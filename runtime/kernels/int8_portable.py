"""Fast products on any CPU: ranks by plain vector operations; lookups and sums as loops that LLVM vectorises where it
can.

This is the scalar twin of the other levels: same sums, same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels import products, ranks
from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.memory import load, local_bytes, store
from rkf.runtime.kernels.simd import insert_lane, select, splat
from rkf.runtime.kernels.vectors import I8x64, I32x8

# --- ranks to bytes, with a table of 256


def _looked_up(rank_registers: Callable[..., Any]) -> Callable[..., Any]:
    @inline
    def lookup(table, register):
        buffer = local_bytes(64)
        store(buffer, register)
        for lane in range(64):
            rank = types.int64(load(types.uint8, buffer + lane))
            store(buffer + lane, load(types.uint8, table + rank))
        return load(I8x64, buffer)

    @inline
    def weights(m, table, row, column):
        even, odd = rank_registers(m, row, column)
        return lookup(table, even), lookup(table, odd)

    return weights


@inline
def _with_bit(ranks_above, bit):
    return ranks_above + ranks_above + select(bit, ranks.constant(1), ranks.constant(0))


@inline
def _ranks1(m, row, column):
    even, odd = ranks.bits(m.plane0, m.stride0, row, column, m.ahead)
    return _with_bit(ranks.constant(0), even), _with_bit(ranks.constant(0), odd)


@inline
def _ranks2(m, row, column):
    even, odd = ranks.pairs(m.plane0, m.stride0, row, column, m.ahead)
    return even & ranks.constant(3), odd & ranks.constant(3)


@inline
def _ranks3(m, row, column):
    even, odd = _ranks2(m, row, column)
    even_bit, odd_bit = ranks.bits(m.plane1, m.stride1, row, column, m.ahead)
    return _with_bit(even, even_bit), _with_bit(odd, odd_bit)


@inline
def _ranks4(m, row, column):
    even, odd = ranks.nibbles(m.plane0, m.stride0, row, column, m.ahead)
    return even & ranks.constant(15), odd & ranks.constant(15)


@inline
def _ranks5(m, row, column):
    even, odd = _ranks4(m, row, column)
    even_bit, odd_bit = ranks.bits(m.plane1, m.stride1, row, column, m.ahead)
    return _with_bit(even, even_bit), _with_bit(odd, odd_bit)


@inline
def _ranks6(m, row, column):
    even, odd = ranks.ranks6(m, row, column)
    return even & ranks.constant(63), odd & ranks.constant(63)


# Ranks without undefined bits, by index width.
RANKS = {
    "1": _ranks1,
    "2": _ranks2,
    "3": _ranks3,
    "4": _ranks4,
    "5": _ranks5,
    "6": _ranks6,
    "7": ranks.ranks7,
    "8": ranks.ranks8,
}
WEIGHTS = {**{width: _looked_up(registers) for width, registers in RANKS.items()}, **products.IDENTITIES}


# --- sums


@inline
def _zero():
    return types.int32(0)


@inline
def _address(block):
    return block


@inline
def _add(total, even, odd, x):
    buffer = local_bytes(128)
    store(buffer, even)
    store(buffer + 64, odd)
    for lane in range(128):
        weight = types.int32(load(types.uint8, buffer + lane))
        total = types.int32(total + weight * types.int32(load(types.int16, x + 2 * lane)))
    return total


@inline
def _join(a, b, c, d, e, f, g, h):
    sums = splat(I32x8, a)
    sums = insert_lane(sums, 1, b)
    sums = insert_lane(sums, 2, c)
    sums = insert_lane(sums, 3, d)
    sums = insert_lane(sums, 4, e)
    sums = insert_lane(sums, 5, f)
    sums = insert_lane(sums, 6, g)
    return insert_lane(sums, 7, h)


SUMS = products.Sums(I8x64, _zero, _address, _add, _join)
