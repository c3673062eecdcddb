"""Norms of a token's row, whole or in adjacent groups, as micro-ops.

A whole row is padded with zeros to whole lanes, and so are its weights. In a group, numbers that do not fill all lanes
are processed one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels.activations import constant
from rkf.runtime.kernels.inline import inline, smaller
from rkf.runtime.kernels.memory import load, load_first, store, store_first
from rkf.runtime.kernels.operands import number, row_of
from rkf.runtime.kernels.simd import fma, lane_sum, splat
from rkf.runtime.kernels.vectors import F32x16
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import LANES, NORM, THREAD

_STEP = LANES * 4


@inline
def _rms(x, weight, out, columns, epsilon):
    """out = x / sqrt(mean(x^2) + epsilon) * weight; x, weight and out may be padded with zeros past `columns`."""
    total = constant(0.0)
    for i in range(0, columns * 4, _STEP):
        value = load(F32x16, x + i)
        total = fma(value, value, total)
    mean = lane_sum(total) / types.float32(columns)
    inverse = splat(F32x16, types.float32(1) / math.sqrt(mean + epsilon))
    for i in range(0, columns * 4, _STEP):
        store(out + i, load(F32x16, x + i) * inverse * load(F32x16, weight + i))


@inline
def _rms_of_group(x, weight, out, columns, epsilon):
    """`_rms` of one group. The next group follows directly, so the last numbers are processed one by one."""
    whole, total, rest = columns // LANES * _STEP, constant(0.0), types.float32(0)
    for i in range(0, whole, _STEP):
        value = load(F32x16, x + i)
        total = fma(value, value, total)
    for i in range(whole, columns * 4, 4):
        rest += load(types.float32, x + i) * load(types.float32, x + i)
    mean = (lane_sum(total) + rest) / types.float32(columns)
    inverse = types.float32(1) / math.sqrt(mean + epsilon)
    for i in range(0, whole, _STEP):
        store(out + i, load(F32x16, x + i) * splat(F32x16, inverse) * load(F32x16, weight + i))
    for i in range(whole, columns * 4, 4):
        store(out + i, load(types.float32, x + i) * inverse * load(types.float32, weight + i))


@inline
def _centred(x, weight, out, columns, epsilon):
    """out = (x - mean) / sqrt(variance + epsilon) * weight, of a row or of a group."""
    total, squares = constant(0.0), constant(0.0)
    for i in range(0, columns, LANES):
        total = total + load_first(F32x16, x + i * 4, smaller(columns - i, LANES))
    mean = splat(F32x16, lane_sum(total) / types.float32(columns))
    for i in range(0, columns, LANES):
        count = smaller(columns - i, LANES)
        store_first(out + i * 4, load_first(F32x16, x + i * 4, count) - mean, count)
        value = load_first(F32x16, out + i * 4, count)
        squares = fma(value, value, squares)
    inverse = types.float32(1) / math.sqrt(lane_sum(squares) / types.float32(columns) + epsilon)
    for i in range(0, columns, LANES):
        count = smaller(columns - i, LANES)
        value = load_first(F32x16, out + i * 4, count) * splat(F32x16, inverse)
        store_first(out + i * 4, value * load_first(F32x16, weight + i * 4, count), count)


@inline
def _add_bias(out, bias, columns):
    for i in range(columns):
        store(out + i * 4, number(out, i) + number(bias, i))


NORMS = {"rms": _rms, "rms_of_groups": _rms_of_group, "centred": _centred}


def norm(kind: str) -> Callable[..., Any]:
    """out = each group of the source, normalised, times weight, plus bias."""
    normalise = NORMS[kind]

    def kernel(token, arguments, batch_address, thread_address):
        m, thread = view(NORM, arguments), view(THREAD, thread_address)
        source, out = row_of(m.source, thread, token), row_of(m.out, thread, token)
        for group in range(m.groups):
            at, own = group * m.columns * 4, group * m.step
            normalise(source + at, m.weight + own, out + at, m.columns, m.epsilon)
            if m.bias != 0:
                _add_bias(out + at, m.bias + own, m.columns)

    return kernel
