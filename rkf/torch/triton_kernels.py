"""Triton kernels: products with a matrix of rank planes, whose weights exist only in registers. Know no module.

A lane is 8 columns of a row: 4 bytes of a 4-bit plane, 2 of a 2-bit plane, 1 of a 1-bit plane, each loaded as one
word. Its 8 columns are 8 phases: phase p uses field p of every word and the elements 8 * lane + p of x, so nothing has
to be interleaved. All sums are f32. Checked under Triton's interpreter and compiled for CUDA; never run on a GPU.

Arguments of both kernels: `plane0..2`: words [rows, lanes]; for an absent plane any pointer with width W0..2 zero;
`tables`: f32[tables, 2^bits], padded so that an index past K reads no other memory; `a`, `b`: f32[rows, groups];
`starts`: i32[rows + 1], `columns_of`: i32[n], `deltas`: f32[n]: the exceptions by rows, each as its difference from the
weight that its rank gives; `most`: the largest number of exceptions in a row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _index(word0, word1, word2, PHASE: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr):
    """The rank of column PHASE of each lane: its fields, most significant plane first."""
    index = (word0.to(tl.int32) >> (PHASE * W0)) & ((1 << W0) - 1)
    if W1:
        index = (index << W1) | ((word1.to(tl.int32) >> (PHASE * W1)) & ((1 << W1) - 1))
    if W2:
        index = (index << W2) | ((word2.to(tl.int32) >> (PHASE * W2)) & ((1 << W2) - 1))
    return index


@triton.jit
def _words(plane, at, inside, WIDTH: tl.constexpr):
    """The words of some lanes of a plane, or zeros if the plane is absent."""
    words = tl.zeros(at.shape, tl.int32)
    if WIDTH:
        words = tl.load(plane + at, mask=inside, other=0).to(tl.int32)
    return words


@triton.jit
def matvec(
    x, y, plane0, plane1, plane2, tables, a, b, bias, starts, columns_of, deltas,
    rows, columns, lanes, groups, lanes_per_group, rows_per_table, most,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y[rows] = W x, x: [columns]. One program has BLOCK_R rows."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    present = row < rows
    table = tables + (tl.minimum(row, rows - 1) // rows_per_table)[:, None] * (1 << (W0 + W1 + W2))
    result = tl.zeros([BLOCK_R, BLOCK_L], tl.float32)
    for start in range(0, lanes, BLOCK_L):
        lane = start + tl.arange(0, BLOCK_L)
        inside = present[:, None] & (lane < lanes)[None, :]
        at = row[:, None] * lanes + lane[None, :]
        word0, word1 = _words(plane0, at, inside, W0), _words(plane1, at, inside, W1)
        word2 = _words(plane2, at, inside, W2)
        part = tl.zeros([BLOCK_R, BLOCK_L], tl.float32)
        total = tl.zeros([BLOCK_L], tl.float32)
        for phase in tl.static_range(8):
            centroid = tl.load(table + _index(word0, word1, word2, phase, W0, W1, W2))
            column = lane * 8 + phase
            value = tl.load(x + column, mask=column < columns, other=0).to(tl.float32)
            part += centroid * value[None, :]
            total += value
        # A lane lies in one group, so its factors are loaded once for 8 weights.
        factor = row[:, None] * groups + (lane // lanes_per_group)[None, :]
        if HAS_A:
            part *= tl.load(a + factor, mask=inside, other=0)
        if HAS_B:
            part += tl.load(b + factor, mask=inside, other=0) * total[None, :]
        result += part
    sums = tl.sum(result, axis=1)
    first, last = tl.load(starts + row, mask=present, other=0), tl.load(starts + row + 1, mask=present, other=0)
    for start in range(0, most, BLOCK_E):
        place = first[:, None] + start + tl.arange(0, BLOCK_E)[None, :]
        inside = place < last[:, None]
        value = tl.load(x + tl.load(columns_of + place, mask=inside, other=0), mask=inside, other=0).to(tl.float32)
        sums += tl.sum(tl.load(deltas + place, mask=inside, other=0) * value, axis=1)
    if HAS_BIAS:
        sums += tl.load(bias + row, mask=present, other=0).to(tl.float32)
    tl.store(y + row, sums.to(y.dtype.element_ty), mask=present)


@triton.jit
def matmul(
    x, y, plane0, plane1, plane2, tables, a, b, bias, starts, columns_of, deltas,
    tokens, rows, lanes, groups, lanes_per_group, rows_per_table, most,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """y[tokens, rows] = x W^T on tensor cores. x: [8, tokens, lanes], with column 8 * lane + phase of a token at
    [phase, token, lane], so that a phase is a product of two plain tiles. Weights are rounded to x's dtype.
    """
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    present, given = row < rows, token < tokens
    table = tables + (tl.minimum(row, rows - 1) // rows_per_table)[None, :] * (1 << (W0 + W1 + W2))
    result = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(0, lanes, BLOCK_L):
        lane = start + tl.arange(0, BLOCK_L)
        there = lane < lanes
        inside = there[:, None] & present[None, :]
        at = row[None, :] * lanes + lane[:, None]
        word0, word1 = _words(plane0, at, inside, W0), _words(plane1, at, inside, W1)
        word2 = _words(plane2, at, inside, W2)
        factor = row[None, :] * groups + (lane // lanes_per_group)[:, None]
        if HAS_A:
            scale = tl.load(a + factor, mask=inside, other=0)
        if HAS_B:
            shift = tl.load(b + factor, mask=inside, other=0)
        for phase in tl.static_range(8):
            weight = tl.load(table + _index(word0, word1, word2, phase, W0, W1, W2))
            if HAS_A:
                weight *= scale
            if HAS_B:
                weight += shift
            at_x = (phase * tokens + token)[:, None] * lanes + lane[None, :]
            value = tl.load(x + at_x, mask=given[:, None] & there[None, :], other=0)
            result = tl.dot(value, weight.to(value.dtype), result, input_precision="ieee")
    first, last = tl.load(starts + row, mask=present, other=0), tl.load(starts + row + 1, mask=present, other=0)
    for number in range(0, most):
        inside = first + number < last
        column = tl.load(columns_of + first + number, mask=inside, other=0)
        delta = tl.load(deltas + first + number, mask=inside, other=0)
        at = ((column % 8)[None, :] * tokens + token[:, None]) * lanes + (column // 8)[None, :]
        value = tl.load(x + at, mask=given[:, None] & inside[None, :], other=0).to(tl.float32)
        result += value * delta[None, :]
    if HAS_BIAS:
        result += tl.load(bias + row, mask=present, other=0).to(tl.float32)[None, :]
    at = token[:, None] * rows + row[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=given[:, None] & present[None, :])
