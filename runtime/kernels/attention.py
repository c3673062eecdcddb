"""Attention of one query head group over one page of the cache, and how pages are put together.

A page holds 256 positions: keys as blocks of 16 positions [head_dim, 16], so that scores come out in lanes without
horizontal sums; values as [256, head_dim]. Each page yields (maximum, sum, weighted values), merged in page order, so
the result does not depend on who computed which page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels.activations import constant, exponential
from rkf.runtime.kernels.inline import inline, piece
from rkf.runtime.kernels.simd import (
    MASK16,
    F32x16,
    first_lane,
    fma,
    lane_maximum,
    lane_sum,
    lanes_below,
    load,
    maximum,
    select,
    splat,
    store,
)
from rkf.runtime.layout import LANES, PARTIAL_HEADER

_LOWEST = -1e30


@inline
def _within(position, first, end):
    """Which of the positions position … position + 15 lie in first … end - 1."""
    return lanes_below(MASK16, end - position) ^ lanes_below(MASK16, first - position)


def page_attention(read: Callable[..., Any], element_bytes: int) -> Callable[..., Any]:
    """attend(q, keys, values, first, end, head_dim, padded, scores, out): one query over positions first … end - 1 of a
    page.

    q: f32[head_dim], already scaled; scores: f32[256] scratch; out: maximum, sum (f32), then f32[padded] at
    PARTIAL_HEADER, where padded is head_dim in whole lanes.
    """

    @inline
    def score_four_blocks(q, keys, head_dim, scores):
        block_bytes = head_dim * LANES * element_bytes
        s0 = s1 = s2 = s3 = constant(0.0)
        for d in range(head_dim):
            query, key = splat(F32x16, load(types.float32, q + d * 4)), keys + d * LANES * element_bytes
            s0 = fma(query, read(key), s0)
            s1 = fma(query, read(key + block_bytes), s1)
            s2 = fma(query, read(key + 2 * block_bytes), s2)
            s3 = fma(query, read(key + 3 * block_bytes), s3)
        store(scores, s0)
        store(scores + 64, s1)
        store(scores + 128, s2)
        store(scores + 192, s3)

    @inline
    def weigh(scores, values, row_bytes, start, count):
        """Sum of scores[p] * values[p] over 16 columns, positions interleaved by eight."""
        t0 = t1 = t2 = t3 = t4 = t5 = t6 = t7 = constant(0.0)
        for p in range(start, count, 8):
            row, score = values + p * row_bytes, scores + p * 4
            t0 = fma(splat(F32x16, load(types.float32, score)), read(row), t0)
            t1 = fma(splat(F32x16, load(types.float32, score + 4)), read(row + row_bytes), t1)
            t2 = fma(splat(F32x16, load(types.float32, score + 8)), read(row + 2 * row_bytes), t2)
            t3 = fma(splat(F32x16, load(types.float32, score + 12)), read(row + 3 * row_bytes), t3)
            t4 = fma(splat(F32x16, load(types.float32, score + 16)), read(row + 4 * row_bytes), t4)
            t5 = fma(splat(F32x16, load(types.float32, score + 20)), read(row + 5 * row_bytes), t5)
            t6 = fma(splat(F32x16, load(types.float32, score + 24)), read(row + 6 * row_bytes), t6)
            t7 = fma(splat(F32x16, load(types.float32, score + 28)), read(row + 7 * row_bytes), t7)
        return ((t0 + t1) + (t2 + t3)) + ((t4 + t5) + (t6 + t7))

    @piece
    def attend(q, keys, values, first, end, head_dim, padded, scores, out):
        begin = first & ~15
        for position in range(first & ~63, end, 64):
            score_four_blocks(q, keys + position * head_dim * element_bytes, head_dim, scores + position * 4)
        highest = constant(_LOWEST)
        for position in range(begin, end, LANES):
            inside = _within(position, first, end)
            highest = maximum(highest, select(inside, load(F32x16, scores + position * 4), constant(_LOWEST)))
        top = lane_maximum(highest)
        total = constant(0.0)
        for position in range(begin, end, LANES):
            inside = _within(position, first, end)
            weight = exponential(load(F32x16, scores + position * 4) - splat(F32x16, top))
            weight = select(inside, weight, constant(0.0))
            store(scores + position * 4, weight)
            total = total + weight
        store(out, top)
        store(out + 4, lane_sum(total))
        row_bytes = padded * element_bytes
        for column in range(0, padded, LANES):
            mixed = weigh(scores, values + column * element_bytes, row_bytes, begin, end)
            store(out + PARTIAL_HEADER + column * 4, mixed)

    return attend


@piece
def merge(total, part, padded):
    """Put a page's result to what the pages before it gave (both as `attend` writes them)."""
    top, part_top = load(types.float32, total), load(types.float32, part)
    highest = max(top, part_top)
    keep = exponential(splat(F32x16, top - highest))
    add = exponential(splat(F32x16, part_top - highest))
    sums = first_lane(keep) * load(types.float32, total + 4) + first_lane(add) * load(types.float32, part + 4)
    store(total, highest)
    store(total + 4, sums)
    for offset in range(PARTIAL_HEADER, PARTIAL_HEADER + padded * 4, LANES * 4):
        store(total + offset, keep * load(F32x16, total + offset) + add * load(F32x16, part + offset))


@piece
def copy(source, target, size):
    """size bytes, a multiple of 64."""
    for offset in range(0, size, 64):
        store(target + offset, load(F32x16, source + offset))


@piece
def finish(total, out, head_dim):
    """out: f32[head_dim] = weighted values over the sum of weights."""
    inverse = types.float32(1) / load(types.float32, total + 4)
    for offset in range(0, head_dim * 4, 4):
        store(out + offset, load(types.float32, total + PARTIAL_HEADER + offset) * inverse)
