"""The numbers of one head's keys and values in a page of the cache: their layout, how they are written, one position
at a time, and how attention multiplies them. Two kinds: f32, and integers with a scale for each key and each value.

A head's region has keys as blocks of [head_dim, 16 positions], so that scores are computed in lanes without horizontal
sums, then values as strips of [256 positions, 16 columns], padded to an even number. Two blocks, 32 positions apart, or
two strips are read side by side: memory gives two streams half as much again as one, if they are not within 4 KiB
(docs/log.md). Integers lie in pairs, two dimensions of a key or two positions of a column of values, because one
instruction multiplies and adds a pair. Their f32 scales follow, by position, of keys and then of values.

Integers are added exactly, in any order and on every CPU. No sum leaves 32 bits: of a key and a query, because neither
is longer than 2^15 (Cauchy-Schwarz); of weights and values, because the weights of a span have a sum below 2^17.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import types

from rkf.runtime.kernels.activations import constant
from rkf.runtime.kernels.inline import inline, smaller
from rkf.runtime.kernels.instructions import dot_pairs, dot_pairs_256, dot_pairs_512
from rkf.runtime.kernels.memory import load, load_first, prefetch, store
from rkf.runtime.kernels.operands import number
from rkf.runtime.kernels.simd import (
    absolute,
    bitcast,
    even_lanes,
    fma,
    join,
    lane_maximum,
    lane_sum,
    maximum,
    odd_lanes,
    part,
    sign_extend,
    splat,
    to_float,
    truncate,
)
from rkf.runtime.kernels.vectors import F32x16, I8x32, I16x16, I16x32, I32x8, I32x16
from rkf.runtime.kv_cache import FORMATS
from rkf.runtime.structs import LANES, PAGE, SPAN, WIDE

_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to the nearest even integer, which is then in the low bits
_LEAST = 1e-30  # a vector whose largest number, length or sum is below this counts as zero
_KEY_LENGTH = 32767.0
_VALUE_MOST = 16383.0
_WEIGHT_SUM, _WEIGHT_MOST = 131008.0, 32767.0  # 2^17 less a unit for every two weights of a span, which are rounded
_STEPS = 16  # bytes of a partial result before the steps of its spans' weights


class CacheFormat(NamedTuple):
    """remember(region, slot, key, value, head_dim, value_dim, padded): write one position, from f32[head_dim] and
    f32[value_dim].

    step: dimensions of a key, or positions of values, in a pair. factor_bytes: of one number of a query, or one weight.
    span: positions whose weighted values are added before they become f32.

    values(region, head_dim), scales(region, head_dim, padded): their addresses; f32 has no scales, and ends there.
    read_keys(keys, index, apart, ahead): 16 * step numbers from there on (`key_block`), and those `apart` on. Reading
    all brings the memory from `ahead` on, three quarters of the keys' size, into the second-level cache.
    read_values(values, index, apart, ahead): the same of values (`value_row`).
    query(source, target, head_dim): a query as factors; returns the scale of its scores.
    scale_keys(scores, region, position, head_dim, padded) and scale_values(weights, …): of sixteen positions.
    weights(row, position, a, b, c, d, partial): store the weights of a span as factors, in a row of f32 scores.
    zero(): an empty sum. add(sum, address, x): sum + the factors at the address times x. finish(sum): as f32.
    finish_span(sum, total, partial, span): the f32 total with the sum of a span.
    """

    remember: Callable[..., Any]
    step: int
    factor_bytes: int
    span: int
    values: Callable[..., Any]
    scales: Callable[..., Any]
    read_keys: Callable[..., Any]
    read_values: Callable[..., Any]
    query: Callable[..., Any]
    scale_keys: Callable[..., Any]
    scale_values: Callable[..., Any]
    weights: Callable[..., Any]
    zero: Callable[..., Any]
    add: Callable[..., Any]
    finish: Callable[..., Any]
    finish_span: Callable[..., Any]


# --- layout: `step` neighbours lie side by side


@inline
def key_block(position, d, head_dim):
    """Index of dimension d, the first of a pair, of the keys of 16 positions, the first a multiple of 16."""
    return position * _even(head_dim) + d * LANES


@inline
def value_row(position, column):
    """Index of the values of one position, the first of a pair, in 16 columns, the first a multiple of 16."""
    return PAGE * column + position * LANES


@inline
def keys_apart(head_dim):
    """Numbers from a key to that of the 32nd position after it."""
    return WIDE * _even(head_dim)


@inline
def _even(head_dim):
    return head_dim + head_dim % 2


@inline
def _key_at(slot, d, head_dim, step):
    return key_block(slot // LANES * LANES, d // step * step, head_dim) + slot % LANES * step + d % step


@inline
def _value_at(slot, i, step):
    return value_row(slot // step * step, i // LANES * LANES) + i % LANES * step + slot % step


def _places(key_size: int, value_size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """CacheFormat's `values` and `scales`."""

    @inline
    def values(region, head_dim):
        return region + PAGE * _even(head_dim) * key_size

    @inline
    def scales(region, head_dim, padded):
        return values(region, head_dim) + PAGE * padded * value_size

    return values, scales


# --- reading


def _reader(read: Callable[..., Any], size: int) -> Callable[..., Any]:
    """read_keys or read_values. read(address): 16 * step numbers of `size` bytes."""

    @inline
    def read_two(base, index, apart, ahead):
        """Each of two streams continues where the other ends, so its next numbers are twice the distance ahead."""
        address, apart_bytes = base + index * size, apart * size
        prefetch(address + 2 * apart_bytes, 3)
        prefetch(address + 3 * apart_bytes, 3)
        prefetch(ahead + index * size * 3 // 4, 2)
        prefetch(ahead + (index * size + apart_bytes) * 3 // 4, 2)
        return read(address), read(address + apart_bytes)

    return read_two


@inline
def _floats(address):
    return load(F32x16, address)


@inline
def _words(address):
    return load(I16x32, address)


@inline
def _bytes(address):
    return sign_extend(I16x32, load(I8x32, address))


_READS = {4: _floats, 2: _words, 1: _bytes}


# --- f32

_f32_values, _f32_scales = _places(4, 4)


@inline
def _remember_f32(region, slot, key, value, head_dim, value_dim, padded):
    for i in range(head_dim):
        store(region + _key_at(slot, i, head_dim, 1) * 4, number(key, i))
    for i in range(value_dim):
        store(_f32_values(region, head_dim) + _value_at(slot, i, 1) * 4, number(value, i))


@inline
def _sixteen(source, at, count):
    """Numbers at … at + 15 of f32[count], zeros past its end."""
    return load_first(F32x16, source + at * 4, smaller(count - at, LANES))


@inline
def _query_f32(source, target, head_dim):
    for at in range(0, head_dim, LANES):
        store(target + at * 4, _sixteen(source, at, head_dim))
    return types.float32(1)


@inline
def _unscaled(x, region, position, head_dim, padded):
    return x


@inline
def _weights_f32(row, position, a, b, c, d, partial):
    store(row + position * 4, a)
    store(row + position * 4 + LANES * 4, b)
    store(row + position * 4 + LANES * 8, c)
    store(row + position * 4 + LANES * 12, d)


@inline
def _zero_f32():
    return constant(0.0)


@inline
def _add_f32(total, address, x):
    return fma(splat(F32x16, load(types.float32, address)), x, total)


@inline
def _finish_f32(total):
    return total


@inline
def _finish_span_f32(total, sums, partial, span):
    return sums + total


_F32 = CacheFormat(
    remember=_remember_f32,
    step=1,
    factor_bytes=4,
    span=PAGE,
    values=_f32_values,
    scales=_f32_scales,
    read_keys=_reader(_floats, 4),
    read_values=_reader(_floats, 4),
    query=_query_f32,
    scale_keys=_unscaled,
    scale_values=_unscaled,
    weights=_weights_f32,
    zero=_zero_f32,
    add=_add_f32,
    finish=_finish_f32,
    finish_span=_finish_span_f32,
)


# --- integers


@inline
def _length(source, count):
    squares = constant(0.0)
    for at in range(0, count, LANES):
        x = _sixteen(source, at, count)
        squares = fma(x, x, squares)
    return math.sqrt(lane_sum(squares))


@inline
def _largest(source, count):
    most = constant(0.0)
    for at in range(0, count, LANES):
        most = maximum(most, absolute(_sixteen(source, at, count)))
    return lane_maximum(most)


@inline
def _steps(size, most):
    """How many steps the number 1 has, and how long one is, if `size` has `most`. NaN and infinity stay."""
    if size < types.float32(_LEAST):
        return types.float32(0), types.float32(0)
    step = size * types.float32(1 / most)
    return types.float32(1) / step, step


@inline
def _store_rounded(address, x, scale):
    """i16[16]: x * scale, rounded."""
    store(address, truncate(I16x16, bitcast(I32x16, fma(x, splat(F32x16, scale), constant(_ROUND)))))


@inline
def _rounded_one(x, scale):
    return types.int32(x * scale + types.float32(_ROUND) - types.float32(_ROUND))


@inline
def _query(source, target, head_dim):
    scale, step = _steps(_length(source, head_dim), _KEY_LENGTH)
    for at in range(0, head_dim, LANES):
        _store_rounded(target + at * 2, _sixteen(source, at, head_dim), scale)
    return step


@inline
def _weights(row, position, a, b, c, d, partial):
    step = lane_sum((a + b) + (c + d)) * types.float32(1 / _WEIGHT_SUM)
    least = lane_maximum(maximum(maximum(a, b), maximum(c, d))) * types.float32(1 / _WEIGHT_MOST)
    if least > step:
        step = least
    scale, step = _steps(step, 1.0)
    store(partial + _STEPS + position // SPAN * 4, step)
    _store_rounded(row + position * 2, a, scale)
    _store_rounded(row + position * 2 + LANES * 2, b, scale)
    _store_rounded(row + position * 2 + LANES * 4, c, scale)
    _store_rounded(row + position * 2 + LANES * 6, d, scale)


@inline
def _zero():
    return splat(I32x16, types.int32(0))


@inline
def _finish(total):
    return to_float(F32x16, total)


@inline
def _finish_span(total, sums, partial, span):
    step = load(types.float32, partial + _STEPS + span * 4)
    return fma(to_float(F32x16, total), splat(F32x16, step), sums)


@inline
def _dot_avx512(total, x, pairs):
    return dot_pairs_512(total, x, pairs)


@inline
def _dot_avxvnni(total, x, pairs):
    low = dot_pairs_256(part(I32x8, total, 0), part(I16x16, x, 0), part(I16x16, pairs, 0))
    high = dot_pairs_256(part(I32x8, total, 1), part(I16x16, x, 1), part(I16x16, pairs, 1))
    return join(I32x16, low, high)


@inline
def _dot_avx2(total, x, pairs):
    low = dot_pairs(part(I16x16, x, 0), part(I16x16, pairs, 0))
    return total + join(I32x16, low, dot_pairs(part(I16x16, x, 1), part(I16x16, pairs, 1)))


@inline
def _wide(x):
    return sign_extend(I32x16, x)


@inline
def _dot_portable(total, x, pairs):
    even = _wide(part(I16x16, even_lanes(x, x), 0)) * _wide(part(I16x16, even_lanes(pairs, pairs), 0))
    odd = _wide(part(I16x16, odd_lanes(x, x), 0)) * _wide(part(I16x16, odd_lanes(pairs, pairs), 0))
    return total + even + odd


_KINDS = {2: types.int16, 1: types.int8}
_DOTS = {"avx512": _dot_avx512, "avxvnni": _dot_avxvnni, "avx2": _dot_avx2}


def _integers(key_size: int, value_size: int, level: str) -> CacheFormat:
    """Integers of 2 bytes or 1."""
    key_kind, value_kind = _KINDS[key_size], _KINDS[value_size]
    key_length, key_most = (_length, _KEY_LENGTH) if key_size == 2 else (_largest, 127.0)
    value_most = _VALUE_MOST if value_size == 2 else 127.0
    dot = _DOTS.get(level, _dot_portable)

    values_of, scales = _places(key_size, value_size)

    @inline
    def remember(region, slot, key, value, head_dim, value_dim, padded):
        values, steps = values_of(region, head_dim), scales(region, head_dim, padded)
        scale, key_step = _steps(key_length(key, head_dim), key_most)
        for i in range(head_dim):
            rounded = key_kind(_rounded_one(number(key, i), scale))
            store(region + _key_at(slot, i, head_dim, 2) * key_size, rounded)
        scale, value_step = _steps(_largest(value, value_dim), value_most)
        for i in range(value_dim):
            store(values + _value_at(slot, i, 2) * value_size, value_kind(_rounded_one(number(value, i), scale)))
        store(steps + slot * 4, key_step)
        store(steps + (PAGE + slot) * 4, value_step)

    @inline
    def scale_keys(x, region, position, head_dim, padded):
        return x * load(F32x16, scales(region, head_dim, padded) + position * 4)

    @inline
    def scale_values(x, region, position, head_dim, padded):
        return x * load(F32x16, scales(region, head_dim, padded) + (PAGE + position) * 4)

    @inline
    def add(total, address, x):
        return dot(total, x, bitcast(I16x32, splat(I32x16, load(types.int32, address))))

    return CacheFormat(
        remember=remember,
        step=2,
        factor_bytes=2,
        span=SPAN,
        values=values_of,
        scales=scales,
        read_keys=_reader(_READS[key_size], key_size),
        read_values=_reader(_READS[value_size], value_size),
        query=_query,
        scale_keys=scale_keys,
        scale_values=scale_values,
        weights=_weights,
        zero=_zero,
        add=add,
        finish=_finish,
        finish_span=_finish_span,
    )


def cache_format(name: str, level: str) -> CacheFormat:
    """A format of kv_cache.FORMATS for a level of CPU."""
    return _F32 if name == "f32" else _integers(*FORMATS[name], level)
