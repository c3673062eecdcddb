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
from rkf.runtime.kernels.memory import load
from rkf.runtime.kernels.simd import bitcast, dot_bytes_32, join, splat, transpose_words
from rkf.runtime.kernels.vectors import I8x32, I32x8, I32x16
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import ACTIVATION, MATRIX

ROWS = 16
_STEP = 64  # columns of a step of int8_avxvnni.py
_PACKED_STEP_BYTES = 2 * _STEP
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
                    t0, t1, t2 = _three_tokens(panel, stride // _STEP, x.packed, x.packed_stride, token, tokens - 1)
                    out = y + token * y_stride + row * 4
                    products.store_rows(t0, m, x, token, out, row, count, digit)
                    if token + 1 < tokens:
                        products.store_rows(t1, m, x, token + 1, out + y_stride, row, count, digit)
                    if token + 2 < tokens:
                        products.store_rows(t2, m, x, token + 2, out + 2 * y_stride, row, count, digit)

    return kernel
