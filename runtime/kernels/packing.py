"""Packing a row of activations for the fast products: integers with one scale and their sum, exact or rounded."""

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
    ROUNDED,
    ROUNDED_LIMIT,
    ROUNDED_SUM_LIMIT,
    THREAD,
)

_STEP = LANES * 4


class Order(NamedTuple):
    """A step has `columns`. store(address of a packed step, group, even, odd): 32 columns of it, the group-th, as
    integers in two registers of even and of odd columns.

    For levels whose products read the bytes of rounded activations: store_rounded(address of a step of them, group,
    even, odd, multiple), the bytes as integers; rounded_bytes: of such a step.
    """

    columns: int
    store: Callable[..., Any]
    store_rounded: Callable[..., Any] | None = None
    rounded_bytes: int = 0


def _bytes(columns: int) -> Order:
    """High bytes of a step's even columns and of its odd ones, then the low bytes. Rounded: bytes of even columns, of
    odd ones, then multiples.
    """
    half_step = columns // 2

    @inline
    def store_bytes(step, group, even, odd):
        half, address = splat(I32x16, types.int32(64)), step + group * 16
        even_high, odd_high = arithmetic_shift_right(even + half, 7), arithmetic_shift_right(odd + half, 7)
        store(address, truncate(I8x16, even_high))
        store(address + half_step, truncate(I8x16, odd_high))
        store(address + 2 * half_step, truncate(I8x16, even - (even_high << 7)))
        store(address + 3 * half_step, truncate(I8x16, odd - (odd_high << 7)))

    @inline
    def store_rounded(step, group, even, odd, multiple):
        store(step + group * 16, truncate(I8x16, even))
        store(step + group * 16 + half_step, truncate(I8x16, odd))
        store(step + columns + group * 4, multiple)

    return Order(columns, store_bytes, store_rounded, columns + columns // ROUNDED * 4)


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


ROUNDED_AVX2_BYTES = 160  # of a step of rounded activations


@inline
def _store_signs_apart(step, group, even, odd, multiple):
    """For AVX2: magnitudes of 32 even columns and of 32 odd ones; for each a byte 0x80, or 0x7f where it is negative;
    the multiple of each two columns as a word.
    """
    address = step + group * 16
    _store_magnitudes(address, truncate(I8x16, even))
    _store_magnitudes(address + 32, truncate(I8x16, odd))
    store(address + 128, splat(I16x8, types.int16(multiple)))


@inline
def _store_magnitudes(address, values):
    zero = splat(I8x16, types.int8(0))
    negative = values < zero
    store(address, select(negative, zero - values, values))
    store(address + 64, select(negative, splat(I8x16, types.int8(127)), splat(I8x16, types.int8(-128))))


ORDERS = {
    "avx512": _bytes(128),
    "avxvnni": _bytes(64),
    "avx2": Order(64, _store_words_by_4, _store_signs_apart, ROUNDED_AVX2_BYTES),
    "neon": Order(128, _bytes(128).store),
    "portable": Order(128, _store_words),
}


def packer(level: str, rounded: bool) -> Callable[..., Any]:
    """pack(activation, token): f32 values to integers, with a scale and their sum (structs.py has the limits).

    One scale per token: int16 activations need no scales by block, and sums stay integers to the end. rounded: each 32
    neighbours become multiples, by signed bytes, of one number. They are integers like any others, so every product
    has the same sums. But some multiply the bytes, with less arithmetic.
    """
    columns, store_integers, store_rounded, rounded_bytes = ORDERS[level]
    zero = types.int32(0)
    sum_limit = ROUNDED_SUM_LIMIT if rounded else ACTIVATION_SUM_LIMIT
    bytes_too = rounded and rounded_bytes > 0

    @inline
    def scale_of(a, values):
        largest = total = constant(0.0)
        for i in range(0, a.columns * 4, _STEP):
            magnitude = absolute(load(F32x16, values + i))
            largest, total = maximum(largest, magnitude), total + magnitude
        return max(
            lane_maximum(largest) / types.float32(ACTIVATION_LIMIT),
            lane_sum(total) / types.float32(sum_limit),
        )

    @inline
    def multiple_of(address, inverse):
        """The number whose multiples the 32 columns from an address on become."""
        largest = maximum(absolute(load(F32x16, address)), absolute(load(F32x16, address + _STEP)))
        return types.int32(lane_maximum(largest) * inverse * types.float32(1 / ROUNDED_LIMIT)) + types.int32(1)

    @inline
    def integers(address, inverse):
        shifted = fma(load(F32x16, address), inverse, constant(ROUND))
        return bitcast(I32x16, shifted) - splat(I32x16, types.int32(ROUND_BITS))

    @inline
    def without_first(integers, count):
        return select(lanes_below(MASK16, count), splat(I32x16, zero), integers)

    @piece
    def pack(a, token):
        values, packed = a.values + token * a.values_stride, a.packed + token * a.packed_stride
        scale = scale_of(a, values)
        inverse = types.float32(0)
        if scale > types.float32(1e-30):
            inverse = types.float32(1) / scale
        multiplier, whole = splat(F32x16, inverse), splat(I32x16, zero)
        bytes_step = packed + a.rounded
        for first in range(0, a.end, columns):
            begin = smaller(first, a.end - columns)
            done = first - begin  # columns of the last step that the step before it has
            for group in range(columns // 32):
                address, multiple = values + (begin + group * 32) * 4, types.int32(1)
                if rounded:
                    multiple = multiple_of(address, inverse)
                    multiplier = splat(F32x16, inverse / types.float32(multiple))
                low, high = integers(address, multiplier), integers(address + _STEP, multiplier)
                if done > group * 32:
                    low, high = without_first(low, done - group * 32), without_first(high, done - group * 32 - LANES)
                if bytes_too:
                    store_rounded(bytes_step, group, even_lanes(low, high), odd_lanes(low, high), multiple)
                if rounded:
                    low, high = low * splat(I32x16, multiple), high * splat(I32x16, multiple)
                whole = whole + low + high
                store_integers(packed + 2 * first, group, even_lanes(low, high), odd_lanes(low, high))
            bytes_step += rounded_bytes
        store(a.scale + token * 4, scale)
        store(a.total + token * 4, lane_sum(whole))

    return pack


def pack(level: str, rounded: bool) -> Callable[..., Any]:
    """The micro-op of a level: a token's rows of an activation are packed."""
    packed = packer(level, rounded)

    def kernel(token, arguments, batch_address, thread_address):
        m, thread = view(PACK, arguments), view(THREAD, thread_address)
        activation = view(ACTIVATION, m.activation + m.private * thread.memory)
        for row in range(token * m.rows, (token + 1) * m.rows):
            packed(activation, row)

    return kernel
