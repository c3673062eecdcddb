"""Packing a row of activations for the fast products: integers with one scale and their sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import types

from rkf.runtime.kernels.activations import ROUND, ROUND_BITS, constant
from rkf.runtime.kernels.inline import inline, piece, smaller
from rkf.runtime.kernels.memory import load, store
from rkf.runtime.kernels.simd import (
    absolute,
    arithmetic_shift_right,
    bitcast,
    even_lanes,
    fma,
    lane_maximum,
    lane_sum,
    lanes_below,
    maximum,
    odd_lanes,
    part,
    select,
    splat,
    truncate,
)
from rkf.runtime.kernels.vectors import MASK16, F32x16, I8x16, I16x8, I16x16, I32x16
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import (
    ACTIVATION,
    ACTIVATION_LIMIT,
    ACTIVATION_SUM_LIMIT,
    LANES,
    PACK,
    THREAD,
)

_STEP = LANES * 4


class Order(NamedTuple):
    """A step has `columns`. store(address of a packed step, group, even, odd): 32 columns of it, the group-th, as
    integers in two registers of even and of odd columns.
    """

    columns: int
    store: Callable[..., Any]


def _bytes(columns: int) -> Order:
    """High bytes of a step's even columns and of its odd ones, then the low bytes."""
    half_step = columns // 2

    @inline
    def store_bytes(step, group, even, odd):
        half, address = splat(I32x16, types.int32(64)), step + group * 16
        even_high, odd_high = arithmetic_shift_right(even + half, 7), arithmetic_shift_right(odd + half, 7)
        store(address, truncate(I8x16, even_high))
        store(address + half_step, truncate(I8x16, odd_high))
        store(address + 2 * half_step, truncate(I8x16, even - (even_high << 7)))
        store(address + 3 * half_step, truncate(I8x16, odd - (odd_high << 7)))

    return Order(columns, store_bytes)


@inline
def _store_words(step, group, even, odd):
    """For any CPU: words of 64 even columns, then of 64 odd ones."""
    store(step + group * 32, truncate(I16x16, even))
    store(step + group * 32 + 128, truncate(I16x16, odd))


@inline
def _store_words_by_4(step, group, even, odd):
    """For AVX2: words of the 16 columns 0, 4, 8, … of 64, then of 2, 6, 10, …, of 1, 5, 9, … and of 3, 7, 11, …"""
    evens, odds, address = truncate(I16x16, even), truncate(I16x16, odd), step + group * 16
    store(address, part(I16x8, even_lanes(evens, evens), 0))
    store(address + 32, part(I16x8, odd_lanes(evens, evens), 0))
    store(address + 64, part(I16x8, even_lanes(odds, odds), 0))
    store(address + 96, part(I16x8, odd_lanes(odds, odds), 0))


ORDERS = {
    "avx512": _bytes(128),
    "avxvnni": _bytes(64),
    "avx2": Order(64, _store_words_by_4),
    "neon": _bytes(128),
    "portable": Order(128, _store_words),
}


def packer(level: str) -> Callable[..., Any]:
    """pack(activation, token): f32 values to integers, with a scale and their sum (structs.py has the limits).

    One scale per token: int16 activations need no scales by block, and sums stay integers to the end.
    """
    columns, store_integers = ORDERS[level]
    zero = types.int32(0)

    @inline
    def rounded(address, inverse):
        shifted = fma(load(F32x16, address), inverse, constant(ROUND))
        return bitcast(I32x16, shifted) - splat(I32x16, types.int32(ROUND_BITS))

    @inline
    def without_first(integers, count):
        return select(lanes_below(MASK16, count), splat(I32x16, zero), integers)

    @piece
    def pack(a, token):
        values = a.values + token * a.values_stride
        largest = total = constant(0.0)
        for i in range(0, a.columns * 4, _STEP):
            magnitude = absolute(load(F32x16, values + i))
            largest, total = maximum(largest, magnitude), total + magnitude
        scale = max(
            lane_maximum(largest) / types.float32(ACTIVATION_LIMIT),
            lane_sum(total) / types.float32(ACTIVATION_SUM_LIMIT),
        )
        inverse = types.float32(0)
        if scale > types.float32(1e-30):
            inverse = types.float32(1) / scale
        multiplier, whole = splat(F32x16, inverse), splat(I32x16, zero)
        packed = a.packed + token * a.packed_stride
        for first in range(0, a.end, columns):
            begin = smaller(first, a.end - columns)
            done = first - begin  # columns of the last step that the step before it has
            for group in range(columns // 32):
                address = values + (begin + group * 32) * 4
                low, high = rounded(address, multiplier), rounded(address + _STEP, multiplier)
                if done > group * 32:
                    low, high = without_first(low, done - group * 32), without_first(high, done - group * 32 - LANES)
                whole = whole + low + high
                store_integers(packed + 2 * first, group, even_lanes(low, high), odd_lanes(low, high))
        store(a.scale + token * 4, scale)
        store(a.total + token * 4, lane_sum(whole))

    return pack


def pack(level: str) -> Callable[..., Any]:
    """The micro-op of a level: a token's rows of an activation are packed."""
    packed = packer(level)

    def kernel(token, arguments, batch_address, thread_address):
        m, thread = view(PACK, arguments), view(THREAD, thread_address)
        activation = view(ACTIVATION, m.activation + m.private * thread.memory)
        for row in range(token * m.rows, (token + 1) * m.rows):
            packed(activation, row)

    return kernel
