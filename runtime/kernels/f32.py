"""Products in f32 and the exact decode of one row: for dense tensors, for rows of the embedding, and as the reference
for fast kernels.

A product decodes eight rows at a time into scratch memory with the matrix's `decode_row`. It multiplies them with every
token in 16 lanes of f32, with fused multiply-adds. Rows are padded with zeros to whole lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels.inline import inline, piece
from rkf.runtime.kernels.memory import call3, load, store
from rkf.runtime.kernels.simd import fma, lane_sum, splat
from rkf.runtime.kernels.vectors import F32x16
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import ACTIVATION, LANES, MATRIX

ROWS = 8


# --- one row, exactly


def dense_row(wide: Callable[..., Any], single: Callable[..., Any], bytes_a_value: int) -> Callable[..., Any]:
    """out: f32[columns, padded to lanes] = row of a dense matrix."""

    def kernel(matrix, row, out):
        m = view(MATRIX, matrix)
        source, whole = m.dense + row * m.columns * bytes_a_value, m.columns // LANES * LANES
        for column in range(0, whole, LANES):
            store(out + column * 4, wide(source + column * bytes_a_value))
        if whole < m.columns:
            store(out + whole * 4, splat(F32x16, types.float32(0)))
            for column in range(whole, m.columns):
                store(out + column * 4, single(source + column * bytes_a_value))

    return kernel


# Reading 16 values, and reading one, in f32 (16-bit formats: half.py).


@inline
def f32_wide(address):
    return load(F32x16, address)


@inline
def f32_single(address):
    return load(types.float32, address)


@inline
def _field(plane, stride, width, row, column):
    bit = column * width
    return (load(types.uint8, plane + row * stride + (bit >> 3)) >> (bit & 7)) & ((1 << width) - 1)


@piece
def clustered_row(matrix, row, out):
    """The normative decode: (a * centroid) + b, each rounded to f32, then the exceptions."""
    m = view(MATRIX, matrix)
    centroids = m.centroids + row // m.rows_per_table * m.centroid_bytes
    if m.columns % LANES > 0:
        store(out + m.columns // LANES * LANES * 4, splat(F32x16, types.float32(0)))
    for group in range((m.columns + m.group - 1) // m.group):
        for column in range(group * m.group, min((group + 1) * m.group, m.columns)):
            rank = _field(m.plane0, m.stride0, m.width0, row, column)
            if m.width1 > 0:
                rank = (rank << m.width1) | _field(m.plane1, m.stride1, m.width1, row, column)
            if m.width2 > 0:
                rank = (rank << m.width2) | _field(m.plane2, m.stride2, m.width2, row, column)
            value = load(types.float32, centroids + rank * 4)
            if m.a != 0:
                value = load(types.float32, m.a + row * m.a_row + group * 4) * value
            if m.b != 0:
                value = value + load(types.float32, m.b + row * m.b_row + group * 4)
            store(out + column * 4, value)
    if m.exception_start != 0:
        start = m.exception_start + row * 8
        for exception in range(load(types.int64, start), load(types.int64, start + 8)):
            column = types.int64(load(types.int32, m.exception_column + exception * 4))
            store(out + column * 4, load(types.float32, m.exception_value + exception * 4))


# --- products


@inline
def _eight_dots(rows, row_bytes, x):
    """Eight dot products of rows in scratch, `row_bytes` each, with one token."""
    zero = splat(F32x16, types.float32(0))
    t0 = t1 = t2 = t3 = t4 = t5 = t6 = t7 = zero
    for offset in range(0, row_bytes, LANES * 4):
        values, row = load(F32x16, x + offset), rows + offset
        t0 = fma(load(F32x16, row), values, t0)
        t1 = fma(load(F32x16, row + row_bytes), values, t1)
        t2 = fma(load(F32x16, row + 2 * row_bytes), values, t2)
        t3 = fma(load(F32x16, row + 3 * row_bytes), values, t3)
        t4 = fma(load(F32x16, row + 4 * row_bytes), values, t4)
        t5 = fma(load(F32x16, row + 5 * row_bytes), values, t5)
        t6 = fma(load(F32x16, row + 6 * row_bytes), values, t6)
        t7 = fma(load(F32x16, row + 7 * row_bytes), values, t7)
    return (
        lane_sum(t0), lane_sum(t1), lane_sum(t2), lane_sum(t3), lane_sum(t4), lane_sum(t5), lane_sum(t6), lane_sum(t7)
    )  # fmt: skip


@piece
def multiply(matrix, activation, tokens, y, y_stride, low, high, scratch):
    """y[token, row] = row of the matrix times token, for rows low..high."""
    m, x = view(MATRIX, matrix), view(ACTIVATION, activation)
    row_bytes = (m.columns + LANES - 1) // LANES * LANES * 4
    for first in range(low, high, ROWS):
        rows = min(high - first, ROWS)
        for i in range(rows):
            call3(m.decode_row, matrix, first + i, scratch + i * row_bytes)
        for token in range(tokens):
            sums = _eight_dots(scratch, row_bytes, x.values + token * x.values_stride)
            for i in range(rows):
                store(y + token * y_stride + (first + i) * 4, sums[i])
