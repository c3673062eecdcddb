"""What happens to a vector between two products: RMSNorm, SwiGLU, exp, and packing for the fast kernels.

Buffers are padded with zeros to whole blocks of columns, so no loop here has a tail; only heads lie side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from numba import types

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
    minimum,
    odd_lanes,
    splat,
    truncate,
)
from rkf.runtime.kernels.vectors import F32x16, I8x16, I16x16, I32x16
from rkf.runtime.structs import ACTIVATION_LIMIT, ACTIVATION_SUM_LIMIT, BLOCK, LANES, PACKED_BLOCK_BYTES

_STEP = LANES * 4
# Adding and subtracting 1.5 * 2^23 rounds an f32 to the nearest even integer, which then lies in the low bits.
_ROUND = 12582912.0
_ROUND_BITS = 0x4B400000


@inline
def constant(value):
    return splat(F32x16, types.float32(value))


@inline
def exponential(x):
    """e^x in 16 lanes, x cut to -87..88: 2^n * polynomial (Cephes expf, within 2 units in the last place)."""
    x = maximum(minimum(x, constant(88.0)), constant(-87.0))
    shifted = fma(x, constant(1.44269504088896341), constant(_ROUND))
    n = shifted - constant(_ROUND)
    r = fma(n, constant(-0.693359375), x)
    r = fma(n, constant(2.12194440e-4), r)
    p = fma(constant(1.9875691500e-4), r, constant(1.3981999507e-3))
    p = fma(p, r, constant(8.3334519073e-3))
    p = fma(p, r, constant(4.1665795894e-2))
    p = fma(p, r, constant(1.6666665459e-1))
    p = fma(p, r, constant(5.0000001201e-1))
    p = fma(p, r * r, r + constant(1.0))
    exponent = (bitcast(I32x16, shifted) - splat(I32x16, types.int32(_ROUND_BITS))) << 23
    return bitcast(F32x16, bitcast(I32x16, p) + exponent)


@piece
def rms_norm(x, weight, out, columns, epsilon):
    """out = x / sqrt(mean(x^2) + epsilon) * weight; x, weight and out may be padded with zeros past `columns`."""
    total = constant(0.0)
    for i in range(0, columns * 4, _STEP):
        value = load(F32x16, x + i)
        total = fma(value, value, total)
    mean = lane_sum(total) / types.float32(columns)
    inverse = splat(F32x16, types.float32(1) / math.sqrt(mean + epsilon))
    for i in range(0, columns * 4, _STEP):
        store(out + i, load(F32x16, x + i) * inverse * load(F32x16, weight + i))


@piece
def head_norm(head, weight, head_dim, epsilon):
    """rms_norm of one head in place; the next head begins right behind it, so its last numbers go singly."""
    whole, total, rest = head_dim // LANES * _STEP, constant(0.0), types.float32(0)
    for i in range(0, whole, _STEP):
        value = load(F32x16, head + i)
        total = fma(value, value, total)
    for i in range(whole, head_dim * 4, 4):
        rest += load(types.float32, head + i) * load(types.float32, head + i)
    mean = (lane_sum(total) + rest) / types.float32(head_dim)
    inverse = types.float32(1) / math.sqrt(mean + epsilon)
    for i in range(0, whole, _STEP):
        store(head + i, load(F32x16, head + i) * splat(F32x16, inverse) * load(F32x16, weight + i))
    for i in range(whole, head_dim * 4, 4):
        store(head + i, load(types.float32, head + i) * inverse * load(types.float32, weight + i))


@piece
def swiglu(gate, up, out, columns):
    """out = gate / (1 + e^-gate) * up; gate and up have whole lanes of memory."""
    for i in range(0, columns * 4, _STEP):
        g = load(F32x16, gate + i)
        sigmoid = constant(1.0) / (constant(1.0) + exponential(constant(0.0) - g))
        store(out + i, g * sigmoid * load(F32x16, up + i))


@inline
def _store_bytes(address, even, odd):
    """For AVX-512 and NEON: high bytes of even columns, of odd ones, then the low bytes: 64 of each a block."""
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
    """pack(activation, token): from f32 values to integers, with a scale and their sum (structs.py has the limits).

    One scale a token: int16 activations leave no need for scales by block, and sums stay integers to the end.
    """
    store_integers, bytes_of_16 = STORES[level]

    @inline
    def rounded(address, inverse):
        shifted = fma(load(F32x16, address), inverse, constant(_ROUND))
        return bitcast(I32x16, shifted) - splat(I32x16, types.int32(_ROUND_BITS))

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
