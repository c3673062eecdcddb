"""Products of many tokens on AVX2 with AVX-VNNI: sixteen rows become a panel of bytes, then three tokens at a time go
over it.

A panel is `u8[columns / 4, 16 rows, 4 columns]`, so that lanes are rows. Two registers of rows, two digits and three
tokens are twelve totals, which leaves registers for the weights and for the broadcast activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels import products
from rkf.runtime.kernels.inline import inline, piece, smaller
from rkf.runtime.kernels.instructions import dot_bytes_32
from rkf.runtime.kernels.memory import load
from rkf.runtime.kernels.simd import bitcast, join, splat, transpose_words
from rkf.runtime.kernels.vectors import I8x32, I32x8, I32x16
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import ACTIVATION, MATRIX, ROUNDED

ROWS = 16
_STEP = 64  # columns of a step of int8_avxvnni.py
_PACKED_STEP_BYTES = 2 * _STEP
_ROUNDED_STEP_BYTES = _STEP + _STEP // ROUNDED * 4  # bytes, then multiples
_FEW = 8  # tokens; up to this number, making panels takes longer than it saves


@inline
def _add_columns(totals, first, second, x):
    """Four columns: the products with a token's high bytes, then with its low ones."""
    high = bitcast(I8x32, splat(I32x8, load(types.int32, x)))
    low = bitcast(I8x32, splat(I32x8, load(types.int32, x + _STEP)))
    return (
        dot_bytes_32(totals[0], first, high),
        dot_bytes_32(totals[1], second, high),
        dot_bytes_32(totals[2], first, low),
        dot_bytes_32(totals[3], second, low),
    )


@inline
def _whole(totals):
    return join(I32x16, (totals[0] << 7) + totals[2], (totals[1] << 7) + totals[3])


@inline
def _three_tokens(panel, steps, packed, stride, token, last):
    """Totals of sixteen rows for tokens token … token + 2 (past the end, the last token repeats)."""
    x0, x1 = packed + token * stride, packed + smaller(token + 1, last) * stride
    x2 = packed + smaller(token + 2, last) * stride
    zero = splat(I32x8, types.int32(0))
    t0 = t1 = t2 = (zero, zero, zero, zero)
    for step in range(steps):
        weights, offset = panel + step * _STEP * ROWS, step * _PACKED_STEP_BYTES
        for _ in range(_STEP // 4):
            first, second = load(I8x32, weights), load(I8x32, weights + 32)
            t0 = _add_columns(t0, first, second, x0 + offset)
            t1 = _add_columns(t1, first, second, x1 + offset)
            t2 = _add_columns(t2, first, second, x2 + offset)
            weights += 4 * ROWS
            offset += 4
    return _whole(t0), _whole(t1), _whole(t2)


@inline
def _rounded_step(total, first, second, x):
    four = bitcast(I8x32, splat(I32x8, load(types.int32, x)))
    return dot_bytes_32(total[0], first, four), dot_bytes_32(total[1], second, four)


@inline
def _add_multiple(total, part, multiple):
    factor = splat(I32x8, load(types.int32, multiple))
    return total[0] + part[0] * factor, total[1] + part[1] * factor


@inline
def _three_tokens_rounded(panel, steps, x, token, last):
    """`_three_tokens` of rounded activations: sums over 32 columns, times their multiple."""
    base, stride = x.packed + x.rounded, x.packed_stride
    x0, x1 = base + token * stride, base + smaller(token + 1, last) * stride
    x2 = base + smaller(token + 2, last) * stride
    zero = splat(I32x8, types.int32(0))
    t0 = t1 = t2 = (zero, zero)
    for step in range(steps):
        for group in range(_STEP // ROUNDED):
            p0 = p1 = p2 = (zero, zero)
            for half in range(2):  # even columns, then odd ones
                weights = panel + step * _STEP * ROWS + half * _STEP // 2 * ROWS + group * ROUNDED // 2 * ROWS
                offset = step * _ROUNDED_STEP_BYTES + half * _STEP // 2 + group * ROUNDED // 2
                for _ in range(ROUNDED // 8):
                    first, second = load(I8x32, weights), load(I8x32, weights + 32)
                    p0 = _rounded_step(p0, first, second, x0 + offset)
                    p1 = _rounded_step(p1, first, second, x1 + offset)
                    p2 = _rounded_step(p2, first, second, x2 + offset)
                    weights += 4 * ROWS
                    offset += 4
            multiple = step * _ROUNDED_STEP_BYTES + _STEP + group * 4
            t0, t1 = _add_multiple(t0, p0, x0 + multiple), _add_multiple(t1, p1, x1 + multiple)
            t2 = _add_multiple(t2, p2, x2 + multiple)
    return join(I32x16, *t0), join(I32x16, *t1), join(I32x16, *t2)


def multiply_many(weights: Callable[..., Any], few: Callable[..., Any]) -> Callable[..., Any]:
    """y[token, row] for many tokens; `few` is the kernel for up to 8. Scratch holds sixteen rows of bytes, then their
    panel.
    """
    decode = products.row_decoder(weights, I8x32)

    @piece
    def decode_panel(m, row, count, digit, rows, panel):
        stride = products.whole_steps(m.end, _STEP)
        decode(m, row, count, digit, rows)
        for offset in range(0, stride, 64):
            transpose_words(rows + offset, stride, panel + offset * ROWS)

    def kernel(matrix, activation, tokens, y, y_stride, low, high, scratch):
        if tokens <= _FEW:
            few(matrix, activation, tokens, y, y_stride, low, high, scratch)
            return
        m, x = view(MATRIX, matrix), view(ACTIVATION, activation)
        stride = products.whole_steps(m.end, _STEP)
        panel = scratch + stride * ROWS
        for row in range(low, high, ROWS):
            count = smaller(high - row, ROWS)
            for digit in range(m.digits):
                decode_panel(m, row, count, digit, scratch, panel)
                for token in range(0, tokens, 3):
                    if x.rounded != 0:
                        t0, t1, t2 = _three_tokens_rounded(panel, stride // _STEP, x, token, tokens - 1)
                    else:
                        t0, t1, t2 = _three_tokens(panel, stride // _STEP, x.packed, x.packed_stride, token, tokens - 1)
                    out = y + token * y_stride + row * 4
                    products.store_rows(t0, m, x, token, out, row, count, digit)
                    if token + 1 < tokens:
                        products.store_rows(t1, m, x, token + 1, out + y_stride, row, count, digit)
                    if token + 2 < tokens:
                        products.store_rows(t2, m, x, token + 2, out + 2 * y_stride, row, count, digit)

    return kernel
