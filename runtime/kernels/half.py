"""16-bit numbers to f32: bf16, and half precision with or without hardware support, bit for bit the same."""

from __future__ import annotations

from numba import types

from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.memory import load
from rkf.runtime.kernels.simd import bitcast, first_lane, select, splat, widen, zero_extend
from rkf.runtime.kernels.vectors import F16x16, F32x16, I16x16, I32x16


@inline
def _constant(value):
    return splat(I32x16, types.int32(value))


@inline
def bf16_widen(words):
    """f32x16 from i16x16 that holds bf16 bits."""
    return bitcast(F32x16, zero_extend(I32x16, words) << 16)


@inline
def hardware_widen(halves):
    """f32x16 from i16x16 that holds half-precision bits (F16C, or any ARM)."""
    return widen(F32x16, bitcast(F16x16, halves))


@inline
def portable_widen(halves):
    """A multiplication moves the exponent, which is also correct for subnormals; infinity and NaN keep an exponent of
    all ones.
    """
    bits = zero_extend(I32x16, halves)
    sign, magnitude = (bits & _constant(0x8000)) << 16, (bits & _constant(0x7FFF)) << 13
    moved = bitcast(I32x16, bitcast(F32x16, magnitude) * splat(F32x16, types.float32(2.0**112)))
    special = (magnitude & _constant(0x0F800000)) == _constant(0x0F800000)
    return bitcast(F32x16, sign | select(special, magnitude | _constant(0x7F800000), moved))


def wide(convert):
    """A function that reads 16 numbers at an address."""

    @inline
    def read(address):
        return convert(load(I16x16, address))

    return read


def single(convert):
    """A function that reads one number at an address."""

    @inline
    def read(address):
        return first_lane(convert(splat(I16x16, load(types.int16, address))))

    return read


def widening(level):
    """The function of a CPU level that widens half-precision numbers."""
    return portable_widen if level == "portable" else hardware_widen
