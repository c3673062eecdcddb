"""Ops with a state per sequence: short convolutions, the gated delta rule and the state space of Mamba 2.

An item is some channels or one head of one sequence in a call, its tokens in order. So the bits do not depend on how
tokens are cut into calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels.activations import ACTIVATIONS, constant, exponential, sigmoid
from rkf.runtime.kernels.inline import inline, smaller
from rkf.runtime.kernels.memory import load, load_first, store, store_first
from rkf.runtime.kernels.operands import number, row_of, word
from rkf.runtime.kernels.simd import absolute, fma, lane_sum, maximum, minimum, splat
from rkf.runtime.kernels.vectors import F32x16
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import CONV, DELTA, LANES, SCAN, THREAD


@inline
def _state(op, token):
    """The state of an op in the sequence of a token."""
    return word(word(op.sequences, token), op.state_word) + op.state


def conv(act: str) -> Callable[..., Any]:
    """out = act(sum over taps of weight * source, plus bias), some channels.

    weight: f32[taps, columns], columns padded to whole lanes; state: f32[taps - 1, columns], the oldest position first.
    """
    function = ACTIVATIONS[act]

    def kernel(item, arguments, batch_address, thread_address):
        op, thread = view(CONV, arguments), view(THREAD, thread_address)
        segment, low = item // op.chunks, item % op.chunks * op.step
        first, end = word(op.segments, segment), word(op.segments, segment + 1)
        kept, row_bytes = op.taps - 1, op.padded * 4
        for column in range(low, smaller(low + op.step, op.columns), LANES):
            count = smaller(op.columns - column, LANES)
            state, weight = _state(op, first) + column * 4, op.weight + column * 4
            for token in range(first, end):
                newest = load_first(F32x16, row_of(op.source, thread, token) + column * 4, count)
                total = constant(0.0)
                for tap in range(kept):
                    held = load(F32x16, state + tap * row_bytes)
                    total = fma(load(F32x16, weight + tap * row_bytes), held, total)
                    if tap > 0:
                        store(state + (tap - 1) * row_bytes, held)
                if kept > 0:
                    store(state + (kept - 1) * row_bytes, newest)
                total = fma(load(F32x16, weight + kept * row_bytes), newest, total)
                if op.bias != 0:
                    total = total + load(F32x16, op.bias + column * 4)
                x = function(total, constant(1.0))
                store_first(row_of(op.out, thread, token) + column * 4, x, count)

    return kernel


@inline
def _softplus(x):
    """log(1 + e^x) in 16 lanes: max(x, 0) + log(1 + y) of y = e^-|x|, by the series of 2 atanh(y / (2 + y))."""
    y = exponential(constant(0.0) - absolute(x))
    z = y / (constant(2.0) + y)
    square = z * z
    p = fma(constant(1 / 15), square, constant(1 / 13))
    p = fma(p, square, constant(1 / 11))
    p = fma(p, square, constant(1 / 9))
    p = fma(p, square, constant(1 / 7))
    p = fma(p, square, constant(1 / 5))
    p = fma(p, square, constant(1 / 3))
    p = fma(p, square, constant(1.0))
    return maximum(x, constant(0.0)) + constant(2.0) * z * p


@inline
def _to_length_one(source, out, count, scale):
    """out = scale * source / sqrt(sum of squares + 1e-6)."""
    squares = constant(0.0)
    for i in range(0, count, LANES):
        value = load_first(F32x16, source + i * 4, smaller(count - i, LANES))
        squares = fma(value, value, squares)
    by = scale / math.sqrt(lane_sum(squares) + types.float32(1e-6))
    for i in range(count):
        store(out + i * 4, types.float32(number(source, i) * by))


@inline
def _decay(op, a, head):
    """exp(-exp(a_log) * softplus(a + dt_bias)) of a value head."""
    rate = exponential(splat(F32x16, number(op.a_log, head)))
    amount = _softplus(splat(F32x16, number(a, head) + number(op.dt_bias, head)))
    return exponential(constant(0.0) - rate * amount)


@inline
def _update(state, k, q, values, out, op, decay, beta, count):
    """S = decay * S; S = S + k outer (beta * (v - S^T k)); out = S^T q, for some columns of S."""
    row_bytes, seen = op.padded * 4, constant(0.0)
    for i in range(op.key_dim):
        row = load(F32x16, state + i * row_bytes) * decay
        store(state + i * row_bytes, row)
        seen = fma(row, splat(F32x16, number(k, i)), seen)
    change, total = beta * (load_first(F32x16, values, count) - seen), constant(0.0)
    for i in range(op.key_dim):
        row = fma(splat(F32x16, number(k, i)), change, load(F32x16, state + i * row_bytes))
        store(state + i * row_bytes, row)
        total = fma(row, splat(F32x16, number(q, i)), total)
    store_first(out, total, count)


def delta(item, arguments, batch_address, thread_address):
    """One value head of the gated delta rule. state: f32[value_heads, key_dim, value_dim], padded to whole lanes."""
    op, thread = view(DELTA, arguments), view(THREAD, thread_address)
    segment, head = item // op.value_heads, item % op.value_heads
    first, end = word(op.segments, segment), word(op.segments, segment + 1)
    state = _state(op, first) + head * op.key_dim * op.padded * 4
    key_head, keys_bytes = head * op.key_heads // op.value_heads, op.key_heads * op.key_dim * 4
    k, q = thread.scratch, thread.scratch + op.key_dim * 4
    query_scale = types.float32(1) / math.sqrt(types.float32(op.key_dim))
    for token in range(first, end):
        source = row_of(op.source, thread, token)
        _to_length_one(source + key_head * op.key_dim * 4, q, op.key_dim, query_scale)
        _to_length_one(source + keys_bytes + key_head * op.key_dim * 4, k, op.key_dim, types.float32(1))
        values = source + 2 * keys_bytes + head * op.value_dim * 4
        out = row_of(op.out, thread, token) + head * op.value_dim * 4
        decay = _decay(op, row_of(op.a, thread, token), head)
        beta = sigmoid(splat(F32x16, number(row_of(op.b, thread, token), head)))
        for column in range(0, op.value_dim, LANES):
            some = smaller(op.value_dim - column, LANES)
            _update(state + column * 4, k, q, values + column * 4, out + column * 4, op, decay, beta, some)


@inline
def _push_row(address, b, c, i, entering, decay, total):
    """Row i of S, 16 columns: S = decay * S + B * entering. Returns total + C * S."""
    row = fma(splat(F32x16, number(b, i)), entering, load(F32x16, address) * decay)
    store(address, row)
    return fma(row, splat(F32x16, number(c, i)), total)


@inline
def _push(state, b, c, entering, op, decay):
    """S = decay * S; S = S + B outer entering; returns S^T C, for 16 columns of S. Four sums, so that none waits."""
    row_bytes, whole = op.padded * 4, op.state_dim // 4 * 4
    total0 = total1 = total2 = total3 = constant(0.0)
    for i in range(0, whole, 4):
        row = state + i * row_bytes
        total0 = _push_row(row, b, c, i, entering, decay, total0)
        total1 = _push_row(row + row_bytes, b, c, i + 1, entering, decay, total1)
        total2 = _push_row(row + 2 * row_bytes, b, c, i + 2, entering, decay, total2)
        total3 = _push_row(row + 3 * row_bytes, b, c, i + 3, entering, decay, total3)
    for i in range(whole, op.state_dim):
        total0 = _push_row(state + i * row_bytes, b, c, i, entering, decay, total0)
    return (total0 + total1) + (total2 + total3)


def scan(item, arguments, batch_address, thread_address):
    """One head of the state space. state: f32[heads, state_dim, head_dim], padded to whole lanes."""
    op, thread = view(SCAN, arguments), view(THREAD, thread_address)
    segment, head = item // op.heads, item % op.heads
    first, end = word(op.segments, segment), word(op.segments, segment + 1)
    state = _state(op, first) + head * op.state_dim * op.padded * 4
    shared_bytes = op.groups * op.state_dim * 4
    to_b = op.heads * op.head_dim * 4 + head * op.groups // op.heads * op.state_dim * 4
    rate = exponential(splat(F32x16, number(op.a_log, head)))
    least, most = splat(F32x16, op.dt_min), splat(F32x16, op.dt_max)
    for token in range(first, end):
        source, out = row_of(op.source, thread, token), row_of(op.out, thread, token)
        step = _softplus(splat(F32x16, number(row_of(op.dt, thread, token), head) + number(op.dt_bias, head)))
        step = minimum(maximum(step, least), most)
        decay = exponential(constant(0.0) - rate * step)
        b = source + to_b
        for column in range(0, op.head_dim, LANES):
            at, count = (head * op.head_dim + column) * 4, smaller(op.head_dim - column, LANES)
            x = load_first(F32x16, source + at, count)
            seen = _push(state + column * 4, b, b + shared_bytes, step * x, op, decay)
            store_first(out + at, fma(splat(F32x16, number(op.d, head)), x, seen), count)
