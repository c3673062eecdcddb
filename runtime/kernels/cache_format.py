"""How keys and values of one head lie in a page of the cache, by number format: written one position at a time, widened
to f32 64 positions at a time.

A head's region: keys as 16 blocks of [head_dim, 16 positions], so that scores come out in lanes without horizontal
sums; then values as [256, padded head_dim]; int8 adds f32 scales by position, of keys, then of values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import types

from rkf.runtime.kernels import f32, half
from rkf.runtime.kernels.inline import inline, larger
from rkf.runtime.kernels.simd import (
    F32x16,
    I8x16,
    I32x16,
    load,
    sign_extend,
    splat,
    store,
    to_float,
)
from rkf.runtime.layout import LANES, PAGE, WIDE


class CacheFormat(NamedTuple):
    """remember(region, slot, key, value, head_dim, padded): write one position, from f32[head_dim] each.

    widen_keys(region, position, count, head_dim, padded, tile), widen_values(…): `count` positions (a multiple of 16)
    from `position` on as f32: [count / 16, head_dim, 16] and [count, whole strips of WIDE columns].
    """

    remember: Callable[..., Any]
    widen_keys: Callable[..., Any]
    widen_values: Callable[..., Any]


@inline
def _float(address, index):
    return load(types.float32, address + index * 4)


@inline
def _key_at(slot, head_dim):
    """Where a position's first number lies among keys; the next ones follow 16 numbers apart."""
    return slot // LANES * LANES * head_dim + slot % LANES


@inline
def _tile_row(padded):
    """Bytes of one position's values in a tile."""
    return (padded + WIDE - 1) // WIDE * WIDE * 4


def plain(read: Callable[..., Any], write: Callable[..., Any], size: int) -> CacheFormat:
    """Floating-point numbers of `size` bytes: read 16 at an address, write one."""

    @inline
    def remember(region, slot, key, value, head_dim, padded):
        keys = region + _key_at(slot, head_dim) * size
        values = region + (PAGE * head_dim + slot * padded) * size
        for i in range(head_dim):
            write(keys + i * LANES * size, _float(key, i))
            write(values + i * size, _float(value, i))

    @inline
    def widen_keys(region, position, count, head_dim, padded, tile):
        source = region + position * head_dim * size
        for i in range(0, count * head_dim, LANES):
            store(tile + i * 4, read(source + i * size))

    @inline
    def widen_values(region, position, count, head_dim, padded, tile):
        source, row_bytes = region + (PAGE * head_dim + position * padded) * size, _tile_row(padded)
        for row in range(count):
            for i in range(0, padded, LANES):
                store(tile + row * row_bytes + i * 4, read(source + (row * padded + i) * size))

    return CacheFormat(remember, widen_keys, widen_values)


@inline
def _write_bytes(source, count, target, step, scale_target):
    """count numbers as signed bytes, `step` bytes apart, and their scale."""
    largest = types.float32(0)
    for i in range(count):
        largest = larger(largest, larger(_float(source, i), -_float(source, i)))
    inverse = types.float32(0)
    if largest > types.float32(1e-30):
        inverse = types.float32(127) / largest
    for i in range(count):
        # Adding and subtracting 1.5 * 2^23 rounds to the nearest even integer.
        shifted = _float(source, i) * inverse + types.float32(12582912.0)
        store(target + i * step, types.int8(shifted - types.float32(12582912.0)))
    store(scale_target, largest / types.float32(127))


@inline
def _read_bytes(address):
    return to_float(F32x16, sign_extend(I32x16, load(I8x16, address)))


@inline
def _scales(region, head_dim, padded):
    return region + PAGE * (head_dim + padded)


@inline
def _remember_bytes(region, slot, key, value, head_dim, padded):
    scales = _scales(region, head_dim, padded) + slot * 4
    _write_bytes(key, head_dim, region + _key_at(slot, head_dim), LANES, scales)
    _write_bytes(value, head_dim, region + PAGE * head_dim + slot * padded, 1, scales + PAGE * 4)


@inline
def _widen_key_bytes(region, position, count, head_dim, padded, tile):
    scales = _scales(region, head_dim, padded)
    for block in range(position, position + count, LANES):
        scale = load(F32x16, scales + block * 4)
        source, target = region + block * head_dim, tile + (block - position) * head_dim * 4
        for i in range(0, LANES * head_dim, LANES):
            store(target + i * 4, _read_bytes(source + i) * scale)


@inline
def _widen_value_bytes(region, position, count, head_dim, padded, tile):
    scales, row_bytes = _scales(region, head_dim, padded) + PAGE * 4, _tile_row(padded)
    for row in range(count):
        scale = splat(F32x16, _float(scales, position + row))
        source = region + PAGE * head_dim + (position + row) * padded
        for i in range(0, padded, LANES):
            store(tile + row * row_bytes + i * 4, _read_bytes(source + i) * scale)


def cache_format(name: str, level: str) -> CacheFormat:
    """f32, f16 or int8 for a level of CPU."""
    if name == "f32":
        return plain(f32.f32_wide, f32.f32_write, 4)
    if name == "int8":
        return CacheFormat(_remember_bytes, _widen_key_bytes, _widen_value_bytes)
    widen, narrow = half.conversions(level)
    return plain(half.wide(widen), half.writer(narrow), 2)
