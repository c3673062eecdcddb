"""The items of a product phase: some rows of a matrix times the rows of its input, and the work fused after it.

Columns past the last row of a matrix are not changed; they stay zero. Outputs that only their job needs are in its
thread's memory, its rows alone: in memory that threads share, they would change cores from layer to layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels.activations import gate, hyperbolic_tangent
from rkf.runtime.kernels.inline import inline, piece, smaller
from rkf.runtime.kernels.memory import call8, load, load_first, store_first
from rkf.runtime.kernels.operands import add_to, number, row_of, word
from rkf.runtime.kernels.simd import splat
from rkf.runtime.kernels.vectors import F32x16
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import ACTIVATION, BATCH, JOB, LANES, MATRIX, PRODUCT, THREAD

_JOB_BYTES = JOB.itemsize
_STEP = LANES * 4


@inline
def _add_exceptions(m, values, out, begin, end):
    """Add the corrections for exceptions begin … end - 1 to one token's output."""
    for exception in range(begin, end):
        row, column, delta = _exception(m, exception)
        add_to(out, row, delta * number(values, column))


@inline
def _add_exceptions_to_four(m, values, stride, out, y_stride, begin, end):
    """The same for four tokens, so that each exception is read once for them; more would not stay in the cache."""
    v1, v2, v3 = values + stride, values + 2 * stride, values + 3 * stride
    y1, y2, y3 = out + y_stride, out + 2 * y_stride, out + 3 * y_stride
    for exception in range(begin, end):
        row, column, delta = _exception(m, exception)
        a, b = delta * number(values, column), delta * number(v1, column)
        c, d = delta * number(v2, column), delta * number(v3, column)
        add_to(out, row, a)
        add_to(y1, row, b)
        add_to(y2, row, c)
        add_to(y3, row, d)


@inline
def _exception(m, at):
    row, column = load(types.int32, m.exception_row + at * 4), load(types.int32, m.exception_column + at * 4)
    return types.int64(row), types.int64(column), number(m.exception_delta, at)


@piece
def _finish_rows(m, x, tokens, y, y_stride, low, high):
    """Complete a fast product: add the exceptions' corrections, then the bias."""
    if m.exception_delta != 0:
        begin, end = word(m.exception_start, low), word(m.exception_start, high)
        fours = tokens // 4 * 4
        for token in range(0, fours, 4):
            values, out = x.values + token * x.values_stride, y + token * y_stride
            _add_exceptions_to_four(m, values, x.values_stride, out, y_stride, begin, end)
        for token in range(fours, tokens):
            _add_exceptions(m, x.values + token * x.values_stride, y + token * y_stride, begin, end)
    if m.bias != 0:
        for token in range(tokens):
            for row in range(low, high):
                add_to(y + token * y_stride, row, number(m.bias, row))


@piece
def multiply(matrix, activation, tokens, y, y_stride, low, high, scratch):
    """y[token, row] = row of the matrix times the activation's token, plus bias, for rows low … high - 1."""
    m = view(MATRIX, matrix)
    kernel = m.multiply_many
    if tokens == 1:
        kernel = m.multiply_one
    call8(kernel, matrix, activation, tokens, y, y_stride, low, high, scratch)
    _finish_rows(m, view(ACTIVATION, activation), tokens, y, y_stride, low, high)


@inline
def _input(p, thread):
    return p.input + p.input_private * thread.memory


@inline
def _rows(p, batch):
    """The number of tokens of a product."""
    if p.top != 0:
        return batch.wanted
    return batch.tokens


@inline
def _row_bytes(job):
    """A token's outputs of a job, in whole lanes."""
    return (job.high - job.low + LANES - 1) // LANES * _STEP


def linear(item, jobs, batch_address, thread_address):
    """y = matrix times input."""
    job, batch, thread = view(JOB, jobs + item * _JOB_BYTES), view(BATCH, batch_address), view(THREAD, thread_address)
    p = view(PRODUCT, job.product)
    y = row_of(p.out, thread, 0)
    multiply(p.matrix, _input(p, thread), _rows(p, batch), y, p.out.stride, job.low, job.high, thread.scratch)


def linear_added(item, jobs, batch_address, thread_address):
    """out += scale * (matrix times input)."""
    job, batch, thread = view(JOB, jobs + item * _JOB_BYTES), view(BATCH, batch_address), view(THREAD, thread_address)
    p = view(PRODUCT, job.product)
    rows, low, high = _rows(p, batch), job.low, job.high
    y, stride = thread.outputs - low * 4, _row_bytes(job)
    multiply(p.matrix, _input(p, thread), rows, y, stride, low, high, thread.scratch)
    scale = splat(F32x16, p.scale)
    for token in range(rows):
        target, delta = row_of(p.out, thread, token), y + token * stride
        for row in range(low, high, LANES):
            count, at = smaller(high - row, LANES), row * 4
            total = load_first(F32x16, target + at, count) + load(F32x16, delta + at) * scale
            store_first(target + at, total, count)


def linear_gated(act: str) -> Callable[..., Any]:
    """out = act(matrix times input) * (partner times input), for the same rows of both."""
    gated = gate(act)

    def kernel(item, jobs, batch_address, thread_address):
        job, batch = view(JOB, jobs + item * _JOB_BYTES), view(BATCH, batch_address)
        thread = view(THREAD, thread_address)
        p = view(PRODUCT, job.product)
        rows, x, low, high = _rows(p, batch), _input(p, thread), job.low, job.high
        stride = _row_bytes(job)
        a = thread.outputs - low * 4
        b = a + rows * stride
        multiply(p.matrix, x, rows, a, stride, low, high, thread.scratch)
        multiply(p.partner, x, rows, b, stride, low, high, thread.scratch)
        for token in range(rows):
            gates, values = a + token * stride, b + token * stride
            gated(gates + low * 4, values + low * 4, row_of(p.out, thread, token) + low * 4, high - low, p)

    return kernel


@inline
def _finish_logits(logits, low, high, scale, softcap):
    """logits = scale * logits, then softcap * tanh(logits / softcap) where there is one."""
    for row in range(low, high, LANES):
        count = smaller(high - row, LANES)
        x = load_first(F32x16, logits + row * 4, count) * splat(F32x16, scale)
        if softcap > 0:
            x = splat(F32x16, softcap) * hyperbolic_tangent(x / splat(F32x16, softcap))
        store_first(logits + row * 4, x, count)


def logits(item, jobs, batch_address, thread_address):
    """The call's logits: rows of the output matrix times the wanted tokens."""
    job, batch, thread = view(JOB, jobs + item * _JOB_BYTES), view(BATCH, batch_address), view(THREAD, thread_address)
    p = view(PRODUCT, job.product)
    y, stride = batch.logits, batch.logits_stride
    multiply(p.matrix, _input(p, thread), batch.wanted, y, stride, job.low, job.high, thread.scratch)
    if p.scale != types.float32(1) or p.softcap > types.float32(0):
        for token in range(batch.wanted):
            _finish_logits(y + token * stride, job.low, job.high, p.scale, p.softcap)
