"""Products of many tokens on AVX2: sixteen rows become a panel of 16-bit words, then four tokens at a time go over it.

A panel is `i16[columns / 2, 16 rows, 2 columns]`, so that lanes are rows: no sums across lanes, and one broadcast of
two activations serves all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels import products
from rkf.runtime.kernels.inline import inline, piece, smaller
from rkf.runtime.kernels.instructions import dot_pairs
from rkf.runtime.kernels.memory import load, store
from rkf.runtime.kernels.simd import bitcast, join, splat, transpose_words
from rkf.runtime.kernels.vectors import I16x16, I32x8, I32x16
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import ACTIVATION, MATRIX

ROWS = 16
_STEP = 64  # columns of a step of int8_avx2.py
_FEW = 8  # tokens; up to this number, making panels takes longer than it saves


@inline
def _store_words(target, values):
    """Two registers of words from one of bytes, in the order of activations."""
    words = bitcast(I16x16, values)
    store(target, words & splat(I16x16, types.int16(255)))
    store(target + 32, words >> 8)


@inline
def _add_pairs(totals, first, second, x):
    pair = bitcast(I16x16, splat(I32x8, load(types.int32, x)))
    return totals[0] + dot_pairs(first, pair), totals[1] + dot_pairs(second, pair)


@inline
def _four_tokens(panel, pairs, packed, stride, token, last):
    """Totals of sixteen rows for tokens token … token + 3 (past the end, the last token repeats)."""
    x0, x1 = packed + token * stride, packed + smaller(token + 1, last) * stride
    x2, x3 = packed + smaller(token + 2, last) * stride, packed + smaller(token + 3, last) * stride
    zero = splat(I32x8, types.int32(0))
    t0 = t1 = t2 = t3 = (zero, zero)
    for pair in range(pairs):
        first, second = load(I16x16, panel + pair * 64), load(I16x16, panel + pair * 64 + 32)
        t0 = _add_pairs(t0, first, second, x0 + pair * 4)
        t1 = _add_pairs(t1, first, second, x1 + pair * 4)
        t2 = _add_pairs(t2, first, second, x2 + pair * 4)
        t3 = _add_pairs(t3, first, second, x3 + pair * 4)
    return join(I32x16, *t0), join(I32x16, *t1), join(I32x16, *t2), join(I32x16, *t3)


def multiply_many(weights: Callable[..., Any], few: Callable[..., Any]) -> Callable[..., Any]:
    """y[token, row] for many tokens; `few` is the kernel for up to 8. Scratch holds sixteen rows of words, then their
    panel.
    """

    @piece
    def decode_panel(m, row, last, digit, rows, panel):
        stride = products.whole_steps(m.end, _STEP) * 2
        for i in range(ROWS):
            source, target = smaller(row + i, last), rows + i * stride
            table = m.table + (source // m.rows_per_table * m.digits + digit) * m.table_bytes
            for begin in range(0, m.end, _STEP):
                even, odd = weights(m, table, source, smaller(begin, m.end - _STEP))
                _store_words(target, even)
                _store_words(target + 64, odd)
                target += 2 * _STEP
        for offset in range(0, stride, 64):
            transpose_words(rows + offset, stride, panel + offset * ROWS)

    def kernel(matrix, activation, tokens, y, y_stride, low, high, scratch):
        if tokens <= _FEW:
            few(matrix, activation, tokens, y, y_stride, low, high, scratch)
            return
        m, x = view(MATRIX, matrix), view(ACTIVATION, activation)
        pairs = products.whole_steps(m.end, _STEP) // 2
        panel = scratch + pairs * 4 * ROWS
        for row in range(low, high, ROWS):
            count = smaller(high - row, ROWS)
            for digit in range(m.digits):
                decode_panel(m, row, high - 1, digit, scratch, panel)
                for token in range(0, tokens, 4):
                    t0, t1, t2, t3 = _four_tokens(panel, pairs, x.packed, x.packed_stride, token, tokens - 1)
                    out = y + token * y_stride + row * 4
                    products.store_rows(t0, m, x, token, out, row, count, digit)
                    if token + 1 < tokens:
                        products.store_rows(t1, m, x, token + 1, out + y_stride, row, count, digit)
                    if token + 2 < tokens:
                        products.store_rows(t2, m, x, token + 2, out + 2 * y_stride, row, count, digit)
                    if token + 3 < tokens:
                        products.store_rows(t3, m, x, token + 3, out + 3 * y_stride, row, count, digit)

    return kernel
