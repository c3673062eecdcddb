"""Packing a row of activations for the fast products: integers with one scale and their sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels.activations import ROUND, ROUND_BITS, constant
from rkf.runtime.kernels.inline import inline, piece
from rkf.runtime.kernels.memory import load, store
from rkf.runtime.kernels.simd import (
    absolute,
    arithmetic_shift_right,
    bitcast,
    even_lanes,
    fma,
    lane_maximum,
    lane_sum,
    maximum,
    odd_lanes,
    splat,
    truncate,
)
from rkf.runtime.kernels.vectors import F32x16, I8x16, I16x16, I32x16
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import (
    ACTIVATION,
    ACTIVATION_LIMIT,
    ACTIVATION_SUM_LIMIT,
    BLOCK,
    LANES,
    PACK,
    PACKED_BLOCK_BYTES,
    THREAD,
)

_STEP = LANES * 4


@inline
def _store_bytes(address, even, odd):
    """For AVX-512 and NEON: per block, high bytes of 64 even columns and of 64 odd ones, then the low bytes."""
    half = splat(I32x16, types.int32(64))
    even_high, odd_high = arithmetic_shift_right(even + half, 7), arithmetic_shift_right(odd + half, 7)
    store(address, truncate(I8x16, even_high))
    store(address + 64, truncate(I8x16, odd_high))
    store(address + 128, truncate(I8x16, even - (even_high << 7)))
    store(address + 192, truncate(I8x16, odd - (odd_high << 7)))


@inline
def _store_words(address, even, odd):
    """For the other kernels: 64 words of even columns, then 64 of odd ones."""
    store(address, truncate(I16x16, even))
    store(address + 128, truncate(I16x16, odd))


STORES = {
    "avx512": (_store_bytes, 16),
    "avx2": (_store_words, 32),
    "neon": (_store_bytes, 16),
    "portable": (_store_words, 32),
}


def packer(level: str) -> Callable[..., Any]:
    """pack(activation, token): f32 values to integers, with a scale and their sum (structs.py has the limits).

    One scale per token: int16 activations need no scales by block, and sums stay integers to the end.
    """
    store_integers, bytes_of_16 = STORES[level]

    @inline
    def rounded(address, inverse):
        shifted = fma(load(F32x16, address), inverse, constant(ROUND))
        return bitcast(I32x16, shifted) - splat(I32x16, types.int32(ROUND_BITS))

    @piece
    def pack(a, token):
        values = a.values + token * a.values_stride
        blocks = (a.columns + BLOCK - 1) // BLOCK
        largest = total = constant(0.0)
        for i in range(0, blocks * BLOCK * 4, _STEP):
            magnitude = absolute(load(F32x16, values + i))
            largest, total = maximum(largest, magnitude), total + magnitude
        scale = max(
            lane_maximum(largest) / types.float32(ACTIVATION_LIMIT),
            lane_sum(total) / types.float32(ACTIVATION_SUM_LIMIT),
        )
        inverse = types.float32(0)
        if scale > types.float32(1e-30):
            inverse = types.float32(1) / scale
        multiplier, whole = splat(F32x16, inverse), splat(I32x16, types.int32(0))
        for block in range(blocks):
            packed = a.packed + token * a.packed_stride + block * PACKED_BLOCK_BYTES
            for part in range(BLOCK // 32):
                address = values + (block * BLOCK + part * 32) * 4
                low, high = rounded(address, multiplier), rounded(address + _STEP, multiplier)
                whole = whole + low + high
                store_integers(packed + part * bytes_of_16, even_lanes(low, high), odd_lanes(low, high))
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
