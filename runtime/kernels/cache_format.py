"""The layout of one head's keys and values in a page of the cache, by number format. They are written one position at a
time, and read as f32 in storage order, straight into attention's sums.

A head's region has keys as blocks of [head_dim, 32 positions], so that scores are computed in lanes without horizontal
sums, then values as strips of [256 positions, 32 columns], the last one padded. int8 adds f32 scales by position, of
keys and then of values. A block or a strip is read as one stretch of memory from start to end. Two streams within 4 KiB
would defeat the hardware's prefetcher and take three times as long (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import types

from rkf.runtime.kernels import f32, half
from rkf.runtime.kernels.inline import inline, larger
from rkf.runtime.kernels.memory import load, prefetch, store
from rkf.runtime.kernels.operands import number
from rkf.runtime.kernels.simd import sign_extend, to_float
from rkf.runtime.kernels.vectors import F32x16, I8x16, I32x16
from rkf.runtime.structs import LANES, PAGE, WIDE

_AHEAD_BYTES = 8192


class CacheFormat(NamedTuple):
    """remember(region, slot, key, value, head_dim, value_dim, padded): write one position, from f32[head_dim] and
    f32[value_dim].

    read(region, number): the 32 numbers from there on (`key_block`, `value_row`), in two registers. They are not scaled
    yet: scale_keys(x, region, position, head_dim, padded) and scale_values(…) apply the scales to the scores and
    weights of sixteen positions, which are fewer.
    """

    remember: Callable[..., Any]
    read: Callable[..., Any]
    scale_keys: Callable[..., Any]
    scale_values: Callable[..., Any]


@inline
def key_block(position, d, head_dim):
    """Index of dimension d of the keys of 32 positions, the first a multiple of 32."""
    return position * head_dim + d * WIDE


@inline
def value_row(position, column, head_dim):
    """Index of the values of one position in 32 columns, the first a multiple of 32."""
    return PAGE * (head_dim + column) + position * WIDE


@inline
def _key_at(slot, d, head_dim):
    return key_block(slot // WIDE * WIDE, d, head_dim) + slot % WIDE


@inline
def _value_at(slot, i, head_dim):
    return value_row(slot, i // WIDE * WIDE, head_dim) + i % WIDE


@inline
def _unscaled(x, region, position, head_dim, padded):
    return x


def _reader(read: Callable[..., Any], size: int) -> Callable[..., Any]:
    """Reads numbers of `size` bytes: `read` returns 16 at an address."""

    @inline
    def read_wide(region, number):
        address = region + number * size
        prefetch(address + _AHEAD_BYTES, 3)
        return read(address), read(address + LANES * size)

    return read_wide


def plain(read: Callable[..., Any], write: Callable[..., Any], size: int) -> CacheFormat:
    """Floating-point numbers of `size` bytes: `read` reads 16 at an address, `write` writes one."""

    @inline
    def remember(region, slot, key, value, head_dim, value_dim, padded):
        for i in range(head_dim):
            write(region + _key_at(slot, i, head_dim) * size, number(key, i))
        for i in range(value_dim):
            write(region + _value_at(slot, i, head_dim) * size, number(value, i))

    return CacheFormat(remember, _reader(read, size), _unscaled, _unscaled)


@inline
def _byte_scale(source, count):
    """The step of signed bytes, and its inverse."""
    largest = types.float32(0)
    for i in range(count):
        largest = larger(largest, larger(number(source, i), -number(source, i)))
    inverse = types.float32(0)
    if largest > types.float32(1e-30):
        inverse = types.float32(127) / largest
    return largest / types.float32(127), inverse


@inline
def _write_byte(address, value):
    # Adding and subtracting 1.5 * 2^23 rounds to the nearest even integer.
    store(address, types.int8(value + types.float32(12582912.0) - types.float32(12582912.0)))


@inline
def _read_bytes(address):
    return to_float(F32x16, sign_extend(I32x16, load(I8x16, address)))


@inline
def _scales(region, head_dim, padded):
    return region + PAGE * (head_dim + padded)


@inline
def _remember_bytes(region, slot, key, value, head_dim, value_dim, padded):
    scales = _scales(region, head_dim, padded)
    key_scale, key_inverse = _byte_scale(key, head_dim)
    value_scale, value_inverse = _byte_scale(value, value_dim)
    for i in range(head_dim):
        _write_byte(region + _key_at(slot, i, head_dim), number(key, i) * key_inverse)
    for i in range(value_dim):
        _write_byte(region + _value_at(slot, i, head_dim), number(value, i) * value_inverse)
    store(scales + slot * 4, key_scale)
    store(scales + (PAGE + slot) * 4, value_scale)


@inline
def _scale_key_bytes(x, region, position, head_dim, padded):
    return x * load(F32x16, _scales(region, head_dim, padded) + position * 4)


@inline
def _scale_value_bytes(x, region, position, head_dim, padded):
    return x * load(F32x16, _scales(region, head_dim, padded) + (PAGE + position) * 4)


def cache_format(name: str, level: str) -> CacheFormat:
    """f32, f16 or int8 for a level of CPU."""
    if name == "f32":
        return plain(f32.f32_wide, f32.f32_write, 4)
    if name == "int8":
        return CacheFormat(_remember_bytes, _reader(_read_bytes, 1), _scale_key_bytes, _scale_value_bytes)
    widen, narrow = half.conversions(level)
    return plain(half.wide(widen), half.writer(narrow), 2)
