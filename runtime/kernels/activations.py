"""Functions of vectors in registers: exp, tanh, erf, and the activations of gates (rkf/model/ops.py names them)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels.inline import inline, piece
from rkf.runtime.kernels.memory import load, store, store_first
from rkf.runtime.kernels.simd import absolute, bitcast, fma, maximum, minimum, select, splat
from rkf.runtime.kernels.vectors import F32x16, I32x16
from rkf.runtime.structs import LANES

_STEP = LANES * 4
# Adding and subtracting 1.5 * 2^23 rounds an f32 to the nearest even integer; after the addition, the low bits hold it.
ROUND = 12582912.0
ROUND_BITS = 0x4B400000


@inline
def constant(value):
    return splat(F32x16, types.float32(value))


@inline
def exponential(x):
    """e^x in 16 lanes, x clamped to -87..88: 2^n * polynomial (Cephes expf, within 2 units in the last place)."""
    x = maximum(minimum(x, constant(88.0)), constant(-87.0))
    shifted = fma(x, constant(1.44269504088896341), constant(ROUND))
    n = shifted - constant(ROUND)
    r = fma(n, constant(-0.693359375), x)
    r = fma(n, constant(2.12194440e-4), r)
    p = fma(constant(1.9875691500e-4), r, constant(1.3981999507e-3))
    p = fma(p, r, constant(8.3334519073e-3))
    p = fma(p, r, constant(4.1665795894e-2))
    p = fma(p, r, constant(1.6666665459e-1))
    p = fma(p, r, constant(5.0000001201e-1))
    p = fma(p, r * r, r + constant(1.0))
    exponent = (bitcast(I32x16, shifted) - splat(I32x16, types.int32(ROUND_BITS))) << 23
    return bitcast(F32x16, bitcast(I32x16, p) + exponent)


@inline
def sigmoid(x):
    return constant(1.0) / (constant(1.0) + exponential(constant(0.0) - x))


@inline
def hyperbolic_tangent(x):
    """tanh in 16 lanes: below 0.625 by Cephes' polynomial (tanhf), above by exp."""
    size, square = absolute(x), x * x
    p = fma(constant(-5.70498872745e-3), square, constant(2.06390887954e-2))
    p = fma(p, square, constant(-5.37397155531e-2))
    p = fma(p, square, constant(1.33314422036e-1))
    p = fma(p, square, constant(-3.33332819422e-1))
    small = fma(p * square, x, x)
    large = constant(1.0) - constant(2.0) / (exponential(size + size) + constant(1.0))
    large = select(x < constant(0.0), constant(0.0) - large, large)
    return select(size < constant(0.625), small, large)


@inline
def _error_function(x):
    """erf in 16 lanes, within 1.5e-7 (Abramowitz and Stegun 7.1.26)."""
    size = absolute(x)
    t = constant(1.0) / fma(constant(0.3275911), size, constant(1.0))
    p = fma(constant(1.061405429), t, constant(-1.453152027))
    p = fma(p, t, constant(1.421413741))
    p = fma(p, t, constant(-0.284496736))
    p = fma(p, t, constant(0.254829592))
    found = constant(1.0) - p * t * exponential(constant(0.0) - size * size)
    return select(x < constant(0.0), constant(0.0) - found, found)


@inline
def _identity(x, alpha):
    return x


@inline
def _sigmoid(x, alpha):
    return sigmoid(x)


@inline
def _silu(x, alpha):
    return x * sigmoid(x * alpha)


@inline
def _gelu(x, alpha):
    return constant(0.5) * x * (constant(1.0) + _error_function(x * constant(0.70710678118654752)))


@inline
def _gelu_tanh(x, alpha):
    inner = constant(0.79788456080286536) * (x + constant(0.044715) * x * x * x)
    return constant(0.5) * x * (constant(1.0) + hyperbolic_tangent(inner))


@inline
def _relu(x, alpha):
    return maximum(x, constant(0.0))


@inline
def _relu2(x, alpha):
    return _relu(x, alpha) * _relu(x, alpha)


ACTIVATIONS = {
    "identity": _identity,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
}


def gate(act: str) -> Callable[..., Any]:
    """gated(a, b, out, columns, numbers): out = act(a) * b, clamped and shifted by `numbers` (limit, alpha, shift); a
    and b have memory for whole lanes, and `columns` columns of out are written.
    """
    function = ACTIVATIONS[act]

    @inline
    def gated_lanes(a, b, numbers):
        limit = splat(F32x16, numbers.limit)
        x = function(minimum(a, limit), splat(F32x16, numbers.alpha))
        return x * (maximum(minimum(b, limit), constant(0.0) - limit) + splat(F32x16, numbers.shift))

    @piece
    def gated(a, b, out, columns, numbers):
        whole = columns // LANES * _STEP
        for i in range(0, whole, _STEP):
            store(out + i, gated_lanes(load(F32x16, a + i), load(F32x16, b + i), numbers))
        if columns % LANES > 0:
            last = gated_lanes(load(F32x16, a + whole), load(F32x16, b + whole), numbers)
            store_first(out + whole, last, columns % LANES)

    return gated
