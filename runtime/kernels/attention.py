"""Attention of a few neighbouring tokens, and the query heads that share a key head, over one page of the cache.

Keys and values are read once for four of these queries. Each page yields (maximum, sum, weighted values) per query.
They are merged in page order, so the result depends neither on the thread of each page nor on the tokens computed
together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels.activations import constant, exponential, hyperbolic_tangent
from rkf.runtime.kernels.cache_format import CacheFormat, key_block, value_row
from rkf.runtime.kernels.inline import inline, larger, piece, smaller
from rkf.runtime.kernels.memory import load, store
from rkf.runtime.kernels.operands import first_seen
from rkf.runtime.kernels.simd import first_lane, fma, lane_maximum, lane_sum, lanes_below, maximum, select, splat
from rkf.runtime.kernels.vectors import MASK16, F32x16
from rkf.runtime.structs import LANES, PAGE, PARTIAL_HEADER, WIDE

_LOWEST = -1e30


@inline
def _spread(address):
    """One f32 in all lanes."""
    return splat(F32x16, load(types.float32, address))


@inline
def _within(position, first, end):
    """Mask of the positions position … position + 15 that are in first … end - 1."""
    return lanes_below(MASK16, end - position) ^ lanes_below(MASK16, first - position)


@inline
def _first_in(page, position, seen):
    """The first position that a query sees, relative to the page's start."""
    return larger(first_seen(position, seen) - page, types.int64(0))


def page_attention(cache: CacheFormat, capped: bool) -> Callable[..., Any]:
    """attend(queries, query_bytes, token_bytes, tokens, heads, position, page, region, op, scores, out).

    queries: f32[head_dim] each, already scaled, of neighbouring tokens and of heads that share a key head; position:
    the first token's (it may be past the page); page: the page's first position; region: the head's in the page; op:
    the ATTENTION; scores: f32[tokens * heads, 256] is scratch; out: a partial result per query, op.partial_bytes apart:
    maximum, sum (f32), then f32[padded] at PARTIAL_HEADER. capped: scores are softcap * tanh(score / softcap).
    """

    @inline
    def plain_score(x, softcap):
        return x

    @inline
    def capped_score(x, softcap):
        cap = splat(F32x16, softcap)
        return cap * hyperbolic_tangent(x / cap)

    finished = capped_score if capped else plain_score

    @inline
    def score(q0, q1, q2, q3, region, position, head_dim, scores0, scores1, scores2, scores3):
        """Four queries against 32 keys."""
        a0 = b0 = c0 = d0 = a1 = b1 = c1 = d1 = constant(0.0)
        for i in range(head_dim):
            k0, k1 = cache.read(region, key_block(position, i, head_dim))
            a, b, c, d = _spread(q0 + i * 4), _spread(q1 + i * 4), _spread(q2 + i * 4), _spread(q3 + i * 4)
            a0, b0, c0, d0 = fma(a, k0, a0), fma(b, k0, b0), fma(c, k0, c0), fma(d, k0, d0)
            a1, b1, c1, d1 = fma(a, k1, a1), fma(b, k1, b1), fma(c, k1, c1), fma(d, k1, d1)
        _store_pair(scores0 + position * 4, a0, a1)
        _store_pair(scores1 + position * 4, b0, b1)
        _store_pair(scores2 + position * 4, c0, c1)
        _store_pair(scores3 + position * 4, d0, d1)

    @inline
    def soften(scores, begin, stop, first, end, region, head_dim, padded, softcap, out):
        """Turn scores of positions begin … stop - 1 into weights: e^(score - maximum) from first to end - 1, else 0.
        Starts the query's partial result.
        """
        highest = constant(_LOWEST)
        for position in range(begin, stop, LANES):
            x = cache.scale_keys(load(F32x16, scores + position * 4), region, position, head_dim, padded)
            x = finished(x, softcap)
            store(scores + position * 4, x)
            highest = maximum(highest, select(_within(position, first, end), x, constant(_LOWEST)))
        top = lane_maximum(highest)
        total = constant(0.0)
        for position in range(begin, stop, LANES):
            weight = exponential(load(F32x16, scores + position * 4) - splat(F32x16, top))
            weight = select(_within(position, first, end), weight, constant(0.0))
            total = total + weight
            store(scores + position * 4, cache.scale_values(weight, region, position, head_dim, padded))
        store(out, top)
        store(out + 4, lane_sum(total))

    @inline
    def weigh(w0, w1, w2, w3, region, begin, stop, column, head_dim, out0, out1, out2, out3):
        """Sums of weight * values over positions begin … stop - 1, four queries, 32 columns."""
        a0 = b0 = c0 = d0 = a1 = b1 = c1 = d1 = constant(0.0)
        for p in range(begin, stop):
            v0, v1 = cache.read(region, value_row(p, column, head_dim))
            a, b, c, d = _spread(w0 + p * 4), _spread(w1 + p * 4), _spread(w2 + p * 4), _spread(w3 + p * 4)
            a0, b0, c0, d0 = fma(a, v0, a0), fma(b, v0, b0), fma(c, v0, c0), fma(d, v0, d0)
            a1, b1, c1, d1 = fma(a, v1, a1), fma(b, v1, b1), fma(c, v1, c1), fma(d, v1, d1)
        # A query that pads a group to four is stored more than once, with the same values.
        _store_pair(out0, a0, a1)
        _store_pair(out1, b0, b1)
        _store_pair(out2, c0, c1)
        _store_pair(out3, d0, d1)

    @piece
    def attend(queries, query_bytes, token_bytes, tokens, heads, position, page, region, op, scores, out):
        head_dim, padded, out_bytes = op.head_dim, op.padded, op.partial_bytes
        count, score_bytes = tokens * heads, PAGE * 4
        begin = _first_in(page, position, op.seen) // WIDE * WIDE
        stop = (smaller(position - page + tokens, PAGE) + WIDE - 1) // WIDE * WIDE
        for start in range(begin, stop, WIDE):
            for i in range(0, count, 4):
                j, k, n = smaller(i + 1, count - 1), smaller(i + 2, count - 1), smaller(i + 3, count - 1)
                score(
                    queries + i // heads * token_bytes + i % heads * query_bytes,
                    queries + j // heads * token_bytes + j % heads * query_bytes,
                    queries + k // heads * token_bytes + k % heads * query_bytes,
                    queries + n // heads * token_bytes + n % heads * query_bytes,
                    region,
                    start,
                    head_dim,
                    scores + i * score_bytes,
                    scores + j * score_bytes,
                    scores + k * score_bytes,
                    scores + n * score_bytes,
                )
        for i in range(count):
            own = position + i // heads
            first, end = _first_in(page, own, op.seen), smaller(own - page + 1, PAGE)
            weights, part = scores + i * score_bytes, out + i * out_bytes
            soften(weights, begin, stop, first, end, region, head_dim, padded, op.softcap, part)
        for column in range(0, padded, WIDE):
            sums = out + PARTIAL_HEADER + column * 4
            for i in range(0, count, 4):
                j, k, n = smaller(i + 1, count - 1), smaller(i + 2, count - 1), smaller(i + 3, count - 1)
                weigh(
                    scores + i * score_bytes,
                    scores + j * score_bytes,
                    scores + k * score_bytes,
                    scores + n * score_bytes,
                    region,
                    begin,
                    stop,
                    column,
                    head_dim,
                    sums + i * out_bytes,
                    sums + j * out_bytes,
                    sums + k * out_bytes,
                    sums + n * out_bytes,
                )

    return attend


@inline
def _store_pair(address, a, b):
    store(address, a)
    store(address + LANES * 4, b)


@piece
def merge(total, part, size):
    """Merge a page's result into that of the pages before it; both are `size` bytes, in the form `attend` writes."""
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
def start(total, size, sinks, head):
    """The result before any page: only a head's sink, if there are sinks (0: none)."""
    for offset in range(0, size, LANES * 4):
        store(total + offset, constant(0.0))
    store(total, types.float32(_LOWEST))
    if sinks != 0:
        store(total, load(types.float32, sinks + head * 4))
        store(total + 4, types.float32(1))


@piece
def finish(total, out, value_dim):
    """out: f32[value_dim] = weighted values over the sum of weights."""
    inverse = types.float32(1) / load(types.float32, total + 4)
    for offset in range(0, value_dim * 4, 4):
        store(out + offset, load(types.float32, total + PARTIAL_HEADER + offset) * inverse)
