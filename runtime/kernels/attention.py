"""Attention of a few neighbouring tokens, and the query heads that share a key head, over one page of the cache.

Keys and values are widened to f32 64 positions at a time, once for all of these queries. Each page yields (maximum,
sum, weighted values) a query, merged in page order: the result does not depend on who computed which page, or on which
tokens were computed together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels.activations import constant, exponential
from rkf.runtime.kernels.cache_format import CacheFormat
from rkf.runtime.kernels.inline import inline, larger, piece, smaller
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
from rkf.runtime.layout import LANES, PAGE, PARTIAL_HEADER, WIDE

_LOWEST = -1e30
_TILE = 64  # positions


@inline
def _spread(address):
    """One f32 in all lanes."""
    return splat(F32x16, load(types.float32, address))


@inline
def _first_seen(position, window):
    """The first position of the page that a query sees; `position` is its own, counted from the page's start."""
    if window == 0:
        return types.int64(0)
    return larger(position + 1 - window, types.int64(0))


@inline
def _score(q0, q1, tile, head_dim, scores0, scores1):
    """Two queries against 64 keys."""
    block = head_dim * LANES * 4
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = constant(0.0)
    for d in range(head_dim):
        a, b, key = _spread(q0 + d * 4), _spread(q1 + d * 4), tile + d * LANES * 4
        k0, k1 = load(F32x16, key), load(F32x16, key + block)
        k2, k3 = load(F32x16, key + 2 * block), load(F32x16, key + 3 * block)
        a0, a1, a2, a3 = fma(a, k0, a0), fma(a, k1, a1), fma(a, k2, a2), fma(a, k3, a3)
        b0, b1, b2, b3 = fma(b, k0, b0), fma(b, k1, b1), fma(b, k2, b2), fma(b, k3, b3)
    _store_four(scores0, a0, a1, a2, a3)
    _store_four(scores1, b0, b1, b2, b3)


@inline
def _store_four(address, a, b, c, d):
    store(address, a)
    store(address + 64, b)
    store(address + 128, c)
    store(address + 192, d)


@inline
def _weigh(weights0, weights1, tile, row_bytes, count, out0, out1):
    """out += sum of weight * values over `count` positions, two queries, 64 columns."""
    a0, a1, a2, a3 = _load_four(out0)
    b0, b1, b2, b3 = _load_four(out1)
    for p in range(count):
        a, b = _spread(weights0 + p * 4), _spread(weights1 + p * 4)
        v0, v1, v2, v3 = _load_four(tile + p * row_bytes)
        a0, a1, a2, a3 = fma(a, v0, a0), fma(a, v1, a1), fma(a, v2, a2), fma(a, v3, a3)
        b0, b1, b2, b3 = fma(b, v0, b0), fma(b, v1, b1), fma(b, v2, b2), fma(b, v3, b3)
    # A lone query is its own partner: both are stored, with the same values.
    _store_four(out0, a0, a1, a2, a3)
    _store_four(out1, b0, b1, b2, b3)


@inline
def _load_four(address):
    return (
        load(F32x16, address),
        load(F32x16, address + 64),
        load(F32x16, address + 128),
        load(F32x16, address + 192),
    )


@inline
def _soften(scores, begin, stop, first, end, out, out_bytes):
    """Scores of positions begin … stop - 1 to weights: e^(score - maximum) from first to end - 1, else 0; starts the
    query's partial result.
    """
    highest = constant(_LOWEST)
    for position in range(begin, stop, LANES):
        seen = _within(position, first, end)
        highest = maximum(highest, select(seen, load(F32x16, scores + position * 4), constant(_LOWEST)))
    top = lane_maximum(highest)
    total = constant(0.0)
    for position in range(begin, stop, LANES):
        weight = exponential(load(F32x16, scores + position * 4) - splat(F32x16, top))
        weight = select(_within(position, first, end), weight, constant(0.0))
        store(scores + position * 4, weight)
        total = total + weight
    for offset in range(0, out_bytes, LANES * 4):
        store(out + offset, constant(0.0))
    store(out, top)
    store(out + 4, lane_sum(total))


@inline
def _within(position, first, end):
    """Which of the positions position … position + 15 lie in first … end - 1."""
    return lanes_below(MASK16, end - position) ^ lanes_below(MASK16, first - position)


def page_attention(cache: CacheFormat) -> Callable[..., Any]:
    """attend(queries, query_bytes, token_bytes, tokens, heads, position, window, region, head_dim, padded, tile,
    scores, out, out_bytes).

    queries: f32[head_dim] each, already scaled, of neighbouring tokens and of heads that share a key head; position:
    the first token's, counted from the page's start (it may lie past its end); region: the head's in the page; tile:
    f32[64, wide] and scores: f32[tokens * heads, 256] are scratch; out: a partial result a query, `out_bytes` apart:
    maximum, sum (f32), then f32[wide] at PARTIAL_HEADER, where wide is head_dim in whole strips of WIDE.
    """
    _, widen_keys, widen_values = cache

    @piece
    def attend(
        queries,
        query_bytes,
        token_bytes,
        tokens,
        heads,
        position,
        window,
        region,
        head_dim,
        padded,
        tile,
        scores,
        out,
        out_bytes,
    ):
        count, row_bytes = tokens * heads, (padded + WIDE - 1) // WIDE * WIDE * 4
        begin = _first_seen(position, window) & ~63
        stop = (smaller(position + tokens, PAGE) + 15) & ~15
        for start in range(begin, stop, _TILE):
            widen_keys(region, start, smaller(stop - start, _TILE), head_dim, padded, tile)
            for i in range(0, count, 2):
                j = smaller(i + 1, count - 1)
                q0 = queries + i // heads * token_bytes + i % heads * query_bytes
                q1 = queries + j // heads * token_bytes + j % heads * query_bytes
                _score(q0, q1, tile, head_dim, scores + (i * PAGE + start) * 4, scores + (j * PAGE + start) * 4)
        for i in range(count):
            own = position + i // heads
            seen, end = _first_seen(own, window), smaller(own + 1, PAGE)
            _soften(scores + i * PAGE * 4, begin, stop, seen, end, out + i * out_bytes, out_bytes)
        for start in range(begin, stop, _TILE):
            rows = smaller(stop - start, _TILE)
            widen_values(region, start, rows, head_dim, padded, tile)
            for i in range(0, count, 2):
                j = smaller(i + 1, count - 1)
                weights0, weights1 = scores + (i * PAGE + start) * 4, scores + (j * PAGE + start) * 4
                for strip in range(0, row_bytes, WIDE * 4):
                    out0, out1 = out + i * out_bytes + PARTIAL_HEADER, out + j * out_bytes + PARTIAL_HEADER
                    _weigh(weights0, weights1, tile + strip, row_bytes, rows, out0 + strip, out1 + strip)

    return attend


@piece
def merge(total, part, size):
    """Put a page's result to what the pages before it gave; both are `size` bytes, as `attend` writes them."""
    top, part_top = load(types.float32, total), load(types.float32, part)
    highest = larger(top, part_top)
    keep = exponential(splat(F32x16, top - highest))
    add = exponential(splat(F32x16, part_top - highest))
    sums = first_lane(keep) * load(types.float32, total + 4) + first_lane(add) * load(types.float32, part + 4)
    for offset in range(PARTIAL_HEADER, size, LANES * 4):
        store(total + offset, keep * load(F32x16, total + offset) + add * load(F32x16, part + offset))
    store(total, highest)
    store(total + 4, sums)


@piece
def start(total, size):
    """What no page has given yet."""
    for offset in range(0, size, LANES * 4):
        store(total + offset, constant(0.0))
    store(total, types.float32(_LOWEST))


@piece
def finish(total, out, head_dim):
    """out: f32[head_dim] = weighted values over the sum of weights."""
    inverse = types.float32(1) / load(types.float32, total + 4)
    for offset in range(0, head_dim * 4, 4):
        store(out + offset, load(types.float32, total + PARTIAL_HEADER + offset) * inverse)
