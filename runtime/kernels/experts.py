"""Mixtures of experts: the choice of a token's experts, and products with their rows of a stack of matrices.

A token's chosen experts are a row of i64[count] numbers, then f32[count] weights. Products are stored by slot. With one
token, slot n is its n-th choice. With several tokens, slots are sorted by expert, so that each expert's rows are
decoded once for all its tokens. Either way a token's slots are added in the order of choice, so the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels.activations import constant, exponential, gate, sigmoid
from rkf.runtime.kernels.inline import inline, piece, smaller
from rkf.runtime.kernels.linear import multiply
from rkf.runtime.kernels.memory import load, load_first, local_bytes, store, store_first
from rkf.runtime.kernels.operands import number, row_of, word
from rkf.runtime.kernels.simd import lane_sum, lanes_below, select, splat
from rkf.runtime.kernels.vectors import MASK16, F32x16
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import ACTIVATION, BATCH, EXPERTS, LANES, MIX, ROUTE, SLOTS, THREAD

_ACTIVATION_BYTES = ACTIVATION.itemsize
_LOWEST = -3.4028234663852886e38


@inline
def _put(address, index, value):
    store(address + index * 4, types.float32(value))


# --- the choice


@inline
def _softmax(source, out, count):
    """out: f32[count] = softmax of the source."""
    top = types.float32(_LOWEST)
    for i in range(count):
        if number(source, i) > top:
            top = number(source, i)
    total = constant(0.0)
    for i in range(0, count, LANES):
        some = smaller(count - i, LANES)
        weight = exponential(load_first(F32x16, source + i * 4, some) - splat(F32x16, top))
        total = total + select(lanes_below(MASK16, some), weight, constant(0.0))
        store_first(out + i * 4, weight, some)
    whole = lane_sum(total)
    for i in range(count):
        _put(out, i, number(out, i) / whole)


@inline
def _sigmoids(source, out, count):
    for i in range(0, count, LANES):
        some = smaller(count - i, LANES)
        store_first(out + i * 4, sigmoid(load_first(F32x16, source + i * 4, some)), some)


@inline
def _themselves(source, out, count):
    for i in range(count):
        _put(out, i, number(source, i))


SCORES = {"softmax": _softmax, "sigmoid": _sigmoids, "chosen": _themselves}


@inline
def _best(ranked, taken, count):
    """The highest expert that is not taken, the first of equals; it always finds one, for any numbers."""
    best = types.int64(-1)
    for i in range(count):
        if number(taken, i) == 0 and (best < 0 or number(ranked, i) > number(ranked, best)):
            best = types.int64(i)
    return best


@inline
def _two_best(ranked, first, count):
    """The sum of the two highest of a group."""
    high = low = types.float32(_LOWEST)
    for i in range(first, first + count):
        x = number(ranked, i)
        if x > high:
            high, low = x, high
        elif x > low:
            low = x
    return high + low


@piece
def _leave_groups_out(ranked, taken, sums, experts, groups, top_groups):
    """Mark the experts of all groups except the best as taken."""
    size = experts // groups
    for group in range(groups):
        _put(sums, group, _two_best(ranked, group * size, size))
    kept = sums + groups * 4
    for group in range(groups):
        _put(kept, group, 0)
    for _ in range(top_groups):
        _put(kept, _best(sums, kept, groups), 1)
    for group in range(groups):
        if number(kept, group) == 0:
            for i in range(group * size, (group + 1) * size):
                _put(taken, i, 1)


def route(score: str) -> Callable[..., Any]:
    """The micro-op that chooses a token's experts, from the products of its row with the router."""
    scored = SCORES[score]
    over_the_chosen = score == "chosen"

    def kernel(token, arguments, batch_address, thread_address):
        op, thread = view(ROUTE, arguments), view(THREAD, thread_address)
        source, out, experts, count = (
            row_of(op.source, thread, token),
            row_of(op.out, thread, token),
            op.experts,
            op.count,
        )
        scores = thread.scratch
        ranked, taken, sums = scores + experts * 4, scores + experts * 8, scores + experts * 12
        scored(source, scores, experts)
        for i in range(experts):
            rank = number(scores, i)
            if op.select != 0:
                rank += number(op.select, i)
            _put(ranked, i, rank)
            _put(taken, i, 0)
        if op.groups > 0:
            _leave_groups_out(ranked, taken, sums, experts, op.groups, op.top_groups)
        weights = out + count * 8
        for n in range(count):
            best = _best(ranked, taken, experts)
            _put(taken, best, 1)
            store(out + n * 8, best)
            _put(weights, n, number(scores, best))
        if over_the_chosen:
            _softmax(weights, weights, count)
        by = op.scale
        if op.normalise != 0:
            total = types.float32(0)
            for n in range(count):
                total += number(weights, n)
            by = by / max(total + op.add, op.floor)
        for n in range(count):
            weight = number(weights, n) * by
            if op.factors != 0:
                weight = weight * number(op.factors, word(out, n))
            _put(weights, n, weight)

    return kernel


# --- several tokens, sorted by expert


def sort(item, arguments, batch_address, thread_address):
    """starts: i64[experts + 1], the slots of each expert; slots: i64[tokens, count]; weights: f32[slots]."""
    op, batch, thread = view(SLOTS, arguments), view(BATCH, batch_address), view(THREAD, thread_address)
    starts, cursors, choices = op.starts, op.cursors, batch.tokens * op.count
    for expert in range(op.experts + 1):
        store(starts + expert * 8, types.int64(0))
    for choice in range(choices):
        expert = word(row_of(op.route, thread, choice // op.count), choice % op.count)
        store(starts + (expert + 1) * 8, word(starts, expert + 1) + 1)
    for expert in range(op.experts):
        store(cursors + expert * 8, word(starts, expert))
        store(starts + (expert + 1) * 8, word(starts, expert) + word(starts, expert + 1))
    for choice in range(choices):
        row, n = row_of(op.route, thread, choice // op.count), choice % op.count
        expert = word(row, n)
        slot = word(cursors, expert)
        store(cursors + expert * 8, slot + 1)
        store(op.slots + choice * 8, slot)
        _put(op.weights, slot, number(row + op.count * 8, n))


@inline
def _copy_words(source, target, size):
    for at in range(0, size, 8):
        store(target + at, load(types.int64, source + at))


def gather(token, arguments, batch_address, thread_address):
    """Copy a token's activation to each of its slots."""
    op = view(SLOTS, arguments)
    x, out = view(ACTIVATION, op.source), view(ACTIVATION, op.gathered)
    for n in range(op.count):
        slot = word(op.slots, token * op.count + n)
        _copy_words(x.packed + token * x.packed_stride, out.packed + slot * out.packed_stride, op.packed_bytes)
        _copy_words(x.values + token * x.values_stride, out.values + slot * out.values_stride, op.values_bytes)
        _put(out.scale, slot, number(x.scale, token))
        store(out.total + slot * 4, load(types.int32, x.total + token * 4))


# --- products


@inline
def _rows_from(activation, first, target):
    """An ACTIVATION at `target` whose first row is row `first` of another."""
    x = view(ACTIVATION, activation)
    store(target, x.columns)
    store(target + 8, x.end)
    store(target + 16, x.values + first * x.values_stride)
    store(target + 24, x.values_stride)
    store(target + 32, x.packed + first * x.packed_stride)
    store(target + 40, x.packed_stride)
    store(target + 48, x.scale + first * 4)
    store(target + 56, x.total + first * 4)
    store(target + 64, x.rounded)
    return target


@inline
def _chosen_by_one(op, thread, group):
    """With one token, group n is its n-th choice: expert, first slot, slots."""
    return word(row_of(op.route, thread, 0), group), group, types.int64(1)


@inline
def _tokens_of_expert(op, thread, group):
    """With several tokens, group n is expert n with the slots of its tokens."""
    first = word(op.starts, group)
    return types.int64(group), first, word(op.starts, group + 1) - first


GROUPS = {"one": _chosen_by_one, "many": _tokens_of_expert}


@inline
def _finish(y, bias, first_bias, low, high, by):
    """y = by * y + bias, for rows low … high - 1."""
    for row in range(low, high):
        value = number(y, row) * by
        if bias != 0:
            value = value + number(bias, first_bias + row)
        _put(y, row, value)


def experts_gate(tokens: str, act: str) -> Callable[..., Any]:
    """out = act(gate times input) * (up times input), for some rows of one expert and its slots."""
    located, gated, alone = GROUPS[tokens], gate(act), tokens == "one"

    def kernel(item, arguments, batch_address, thread_address):
        op, thread = view(EXPERTS, arguments), view(THREAD, thread_address)
        low = item % op.chunks * op.step
        high = smaller(low + op.step, op.rows)
        expert, first, count = located(op, thread, item // op.chunks)
        base, source = expert * op.rows, first
        if alone:
            source = types.int64(0)
        x = _rows_from(op.input + op.input_private * thread.memory, source, local_bytes(_ACTIVATION_BYTES))
        a, b, out = row_of(op.a, thread, first), row_of(op.b, thread, first), row_of(op.out, thread, first)
        if count > 0:
            multiply(op.matrix, x, count, a - base * 4, op.a.stride, base + low, base + high, thread.scratch)
            multiply(op.partner, x, count, b - base * 4, op.b.stride, base + low, base + high, thread.scratch)
        for row in range(count):
            by = types.float32(1)
            if op.scale_input != 0:
                if alone:
                    by = number(row_of(op.route, thread, 0) + op.count * 8, first)
                else:
                    by = number(op.weights, first + row)
            gates, values = a + row * op.a.stride, b + row * op.b.stride
            if op.scale_input != 0 or op.bias != 0:
                _finish(gates, op.bias, base, low, high, by)
            if op.scale_input != 0 or op.partner_bias != 0:
                _finish(values, op.partner_bias, base, low, high, by)
            gated(gates + low * 4, values + low * 4, out + row * op.out.stride + low * 4, high - low, op)

    return kernel


def experts_down(tokens: str) -> Callable[..., Any]:
    """a = down times input, for some rows of one expert and its slots."""
    located = GROUPS[tokens]

    def kernel(item, arguments, batch_address, thread_address):
        op, thread = view(EXPERTS, arguments), view(THREAD, thread_address)
        low = item % op.chunks * op.step
        high = smaller(low + op.step, op.rows)
        expert, first, count = located(op, thread, item // op.chunks)
        base = expert * op.rows
        x = _rows_from(op.input + op.input_private * thread.memory, first, local_bytes(_ACTIVATION_BYTES))
        if count > 0:
            y = row_of(op.a, thread, first) - base * 4
            multiply(op.matrix, x, count, y, op.a.stride, base + low, base + high, thread.scratch)

    return kernel


def mix(token, arguments, batch_address, thread_address):
    """The micro-op that adds up a token's experts: out = sum of weight * (y + bias)."""
    op, thread = view(MIX, arguments), view(THREAD, thread_address)
    route, out = row_of(op.route, thread, token), row_of(op.out, thread, token)
    for column in range(0, op.columns, LANES):
        some, total = smaller(op.columns - column, LANES), constant(0.0)
        for n in range(op.count):
            slot = types.int64(n)
            if op.slots != 0:
                slot = word(op.slots, token * op.count + n)
            y = load(F32x16, row_of(op.y, thread, slot) + column * 4)
            if op.bias != 0:
                y = y + load_first(F32x16, op.bias + (word(route, n) * op.columns + column) * 4, some)
            weight = types.float32(1)
            if op.scale_input == 0:
                weight = number(route + op.count * 8, n)
            total = total + y * splat(F32x16, weight)
        store(out + column * 4, total)
