"""A token phase and the plain micro-ops: work on one token's row of a value, number by number.

Rows are padded with zeros to whole lanes, and writes keep the padding zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rkf.runtime.kernels.activations import ACTIVATIONS, constant, exponential, gate
from rkf.runtime.kernels.inline import inline, smaller
from rkf.runtime.kernels.memory import call3, call4, load, load_first, store, store_first
from rkf.runtime.kernels.operands import number, row_of, word
from rkf.runtime.kernels.simd import maximum, minimum, select, splat
from rkf.runtime.kernels.vectors import F32x16
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import CONCAT, EMBED, LANES, MATRIX, MICRO, PAIR, SCALE, TAKE, THREAD, TOKENS, XIELU

_MICRO_BYTES = MICRO.itemsize
_STEP = LANES * 4


def tokens(item, arguments, batch_address, thread_address):
    """A token phase: the micro-ops of one token, in order."""
    phase = view(TOKENS, arguments)
    for index in range(phase.count):
        micro = view(MICRO, phase.micros + index * _MICRO_BYTES)
        call4(micro.work, item, micro.arguments, batch_address, thread_address)


def embed(token, arguments, batch_address, thread_address):
    """out = scale * the token's row of a matrix."""
    m, thread = view(EMBED, arguments), view(THREAD, thread_address)
    out = row_of(m.out, thread, token)
    call3(view(MATRIX, m.matrix).decode_row, m.matrix, word(m.ids, token), out)
    for i in range(0, m.columns * 4, _STEP):
        store(out + i, load(F32x16, out + i) * splat(F32x16, m.scale))


def take(item, arguments, batch_address, thread_address):
    """out = the source's row of wanted token number `item`."""
    m, thread = view(TAKE, arguments), view(THREAD, thread_address)
    source, out = row_of(m.source, thread, word(m.rows, item)), row_of(m.out, thread, item)
    for i in range(0, m.columns * 4, _STEP):
        store(out + i, load(F32x16, source + i))


def add(token, arguments, batch_address, thread_address):
    """out = a + scale * b."""
    m, thread = view(PAIR, arguments), view(THREAD, thread_address)
    a, b, out = row_of(m.a, thread, token), row_of(m.b, thread, token), row_of(m.out, thread, token)
    for i in range(0, m.columns * 4, _STEP):
        store(out + i, load(F32x16, a + i) + load(F32x16, b + i) * splat(F32x16, m.scale))


def scale(token, arguments, batch_address, thread_address):
    """out = scale * source, times a factor of the model or of the token if there is one."""
    m, thread = view(SCALE, arguments), view(THREAD, thread_address)
    source, out, by = row_of(m.source, thread, token), row_of(m.out, thread, token), m.scale
    if m.factors != 0:
        by = by * number(m.factors, token * m.by_token)
    for i in range(0, m.columns * 4, _STEP):
        store(out + i, load(F32x16, source + i) * splat(F32x16, by))


@inline
def _copy(source, target, columns):
    """Columns of a row, and none past them."""
    for i in range(0, columns, LANES):
        count = smaller(columns - i, LANES)
        store_first(target + i * 4, load_first(F32x16, source + i * 4, count), count)


def concat(token, arguments, batch_address, thread_address):
    """out = for each head its columns of a, then those of b."""
    m, thread = view(CONCAT, arguments), view(THREAD, thread_address)
    a, b, out = row_of(m.a, thread, token), row_of(m.b, thread, token), row_of(m.out, thread, token)
    for head in range(m.heads):
        target = out + head * (m.a_columns + m.b_columns) * 4
        _copy(a + head * m.a_columns * 4, target, m.a_columns)
        _copy(b + head * m.b_columns * 4, target + m.a_columns * 4, m.b_columns)


def xielu(token, arguments, batch_address, thread_address):
    """out = positive x^2 + beta x for x > 0, otherwise negative (exp(min(x, eps)) - 1 - x) + beta x."""
    m, thread = view(XIELU, arguments), view(THREAD, thread_address)
    source, out = row_of(m.source, thread, token), row_of(m.out, thread, token)
    for i in range(0, m.columns, LANES):
        count = smaller(m.columns - i, LANES)
        x = minimum(load_first(F32x16, source + i * 4, count), splat(F32x16, m.limit))
        above = splat(F32x16, m.positive) * x * x
        power = exponential(minimum(x, splat(F32x16, m.eps)))
        below = splat(F32x16, m.negative) * (power - constant(1.0) - x)
        curve = select(constant(0.0) < x, above, below)
        store_first(out + i * 4, curve + splat(F32x16, m.beta) * x, count)


def clip(token, arguments, batch_address, thread_address):
    """out = a clamped to -limit … limit."""
    m, thread = view(PAIR, arguments), view(THREAD, thread_address)
    a, out, limit = row_of(m.a, thread, token), row_of(m.out, thread, token), splat(F32x16, m.limit)
    for i in range(0, m.columns * 4, _STEP):
        store(out + i, maximum(minimum(load(F32x16, a + i), limit), constant(0.0) - limit))


@inline
def _spread(address, columns, scratch):
    """A row that repeats one number `columns` times."""
    for i in range(0, columns * 4, _STEP):
        store(scratch + i, splat(F32x16, number(address, 0)))
    return scratch


def gated(act: str) -> Callable[..., Any]:
    """out = act(a) * b; a or b may be one number."""
    apply = gate(act)

    def kernel(token, arguments, batch_address, thread_address):
        m, thread = view(PAIR, arguments), view(THREAD, thread_address)
        a, b, out = row_of(m.a, thread, token), row_of(m.b, thread, token), row_of(m.out, thread, token)
        if m.a_single != 0:
            a = _spread(a, m.columns, thread.scratch)
        elif m.b_single != 0:
            b = _spread(b, m.columns, thread.scratch)
        apply(a, b, out, m.columns, m)

    return kernel


def activated(act: str) -> Callable[..., Any]:
    """out = act(a)."""
    function = ACTIVATIONS[act]

    def kernel(token, arguments, batch_address, thread_address):
        m, thread = view(PAIR, arguments), view(THREAD, thread_address)
        a, out = row_of(m.a, thread, token), row_of(m.out, thread, token)
        for i in range(0, m.columns, LANES):
            count = smaller(m.columns - i, LANES)
            x = minimum(load_first(F32x16, a + i * 4, count), splat(F32x16, m.limit))
            store_first(out + i * 4, function(x, splat(F32x16, m.alpha)), count)

    return kernel
