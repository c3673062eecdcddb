"""16-bit numbers to and from f32: bf16, and half precision with or without hardware support, bit for bit the same."""

from __future__ import annotations

from numba import types

from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.memory import load, store
from rkf.runtime.kernels.simd import (
    bitcast,
    first_lane,
    maximum,
    minimum,
    narrow,
    select,
    splat,
    truncate,
    widen,
    zero_extend,
)
from rkf.runtime.kernels.vectors import F16x16, F32x16, I16x16, I32x16

LARGEST = 65504.0


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
def hardware_narrow(values):
    """i16x16 of half-precision bits; values beyond the range become the largest finite one."""
    return bitcast(I16x16, narrow(F16x16, _cut(values)))


@inline
def _cut(values):
    limit = splat(F32x16, types.float32(LARGEST))
    return maximum(minimum(values, limit), splat(F32x16, types.float32(0)) - limit)


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


@inline
def portable_narrow(values):
    """Normal numbers: add half a unit minus one plus the lowest kept bit, then cut. Small ones: add 0.5 in f32."""
    bits = bitcast(I32x16, _cut(values))
    sign, magnitude = (bits >> 16) & _constant(0x8000), bits & _constant(0x7FFFFFFF)
    normal = (magnitude + _constant(0xFFF - (112 << 23)) + ((magnitude >> 13) & _constant(1))) >> 13
    half = splat(F32x16, types.float32(0.5))
    small = bitcast(I32x16, bitcast(F32x16, magnitude) + half) - bitcast(I32x16, half)
    below = bitcast(F32x16, magnitude) < splat(F32x16, types.float32(2.0**-14))
    return truncate(I16x16, sign | select(below, small, normal))


def writer(convert):
    """A function that writes one f32 in half precision."""

    @inline
    def write(address, value):
        store(address, first_lane(convert(splat(F32x16, value))))

    return write


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


def conversions(level):
    """The functions of a CPU level that widen and narrow half-precision numbers."""
    if level == "portable":
        return portable_widen, portable_narrow
    return hardware_widen, hardware_narrow
