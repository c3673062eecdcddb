"""Attention of a few neighbouring tokens, and the query heads that share a key head, over one page of the cache.

Keys and values are read once for eight of these queries, or for four. Each page yields (maximum, sum, weighted values)
per query. They are merged in page order, so the result depends neither on the thread of each page nor on the tokens
computed together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
def _within(position, first, end, x, other):
    """x at the positions position … position + 15 that are in first … end - 1, `other` elsewhere."""
    if position >= first and position + LANES <= end:
        return x
    return select(lanes_below(MASK16, end - position) ^ lanes_below(MASK16, first - position), x, constant(other))


@inline
def _first_in(page, position, seen):
    """The first position that a query sees, relative to the page's start."""
    return larger(first_seen(position, seen) - page, types.int64(0))


# --- some queries at a time: the addresses of their rows, and their sums, as tuples


class QueryGroup(NamedTuple):
    """rows(table, i, last): the addresses of `count` rows from the i-th on; past the last, it repeats. table: (address
    of the first, bytes to the next head's, heads, bytes to the next token's).

    zeros() -> sums; add(sums, rows, offset, x): sums + the number at each row + offset, times x; store(rows, offset,
    low, high): the sums of 32 columns.
    """

    count: int
    rows: Callable[..., Any]
    zeros: Callable[..., Any]
    add: Callable[..., Any]
    store: Callable[..., Any]


@inline
def _row(table, i):
    return table[0] + i % table[2] * table[1] + i // table[2] * table[3]


@inline
def _four_rows(table, i, last):
    j, k, n = smaller(i + 1, last), smaller(i + 2, last), smaller(i + 3, last)
    return _row(table, i), _row(table, j), _row(table, k), _row(table, n)


@inline
def _four_zeros():
    zero = constant(0.0)
    return zero, zero, zero, zero


@inline
def _add_four(sums, rows, offset, x):
    return (
        fma(_spread(rows[0] + offset), x, sums[0]),
        fma(_spread(rows[1] + offset), x, sums[1]),
        fma(_spread(rows[2] + offset), x, sums[2]),
        fma(_spread(rows[3] + offset), x, sums[3]),
    )


@inline
def _store_four(rows, offset, low, high):
    """A row that repeats is stored more than once, with the same values."""
    _store_pair(rows[0] + offset, low[0], high[0])
    _store_pair(rows[1] + offset, low[1], high[1])
    _store_pair(rows[2] + offset, low[2], high[2])
    _store_pair(rows[3] + offset, low[3], high[3])


@inline
def _eight_rows(table, i, last):
    return _four_rows(table, i, last), _four_rows(table, smaller(i + 4, last), last)


@inline
def _eight_zeros():
    return _four_zeros(), _four_zeros()


@inline
def _add_eight(sums, rows, offset, x):
    return _add_four(sums[0], rows[0], offset, x), _add_four(sums[1], rows[1], offset, x)


@inline
def _store_eight(rows, offset, low, high):
    _store_four(rows[0], offset, low[0], high[0])
    _store_four(rows[1], offset, low[1], high[1])


FOUR = QueryGroup(4, _four_rows, _four_zeros, _add_four, _store_four)
EIGHT = QueryGroup(8, _eight_rows, _eight_zeros, _add_eight, _store_eight)  # for 32 registers


def page_attention(cache: CacheFormat, capped: bool, group: QueryGroup) -> Callable[..., Any]:
    """attend(queries, query_bytes, token_bytes, tokens, heads, position, page, region, op, scores, out).

    queries: f32[head_dim] each, already scaled, of neighbouring tokens and of heads that share a key head; position:
    the first token's (it may be past the page); page: the page's first position; region: the head's in the page; op:
    the ATTENTION; scores: f32[tokens * heads, 256] is scratch; out: a partial result per query, op.partial_bytes apart:
    maximum, sum (f32), then f32[padded] at PARTIAL_HEADER. capped: scores are softcap * tanh(score / softcap). group:
    the queries at a time; up to four are taken as FOUR.
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
    def soften(scores, begin, stop, first, end, region, head_dim, padded, softcap, out):
        """Turn scores of positions begin … stop - 1 into weights: e^(score - maximum) from first to end - 1, else 0.
        Starts the query's partial result.
        """
        highest = constant(_LOWEST)
        for position in range(begin, stop, LANES):
            x = cache.scale_keys(load(F32x16, scores + position * 4), region, position, head_dim, padded)
            x = finished(x, softcap)
            store(scores + position * 4, x)
            highest = maximum(highest, _within(position, first, end, x, _LOWEST))
        top = lane_maximum(highest)
        total = constant(0.0)
        for position in range(begin, stop, LANES):
            weight = exponential(load(F32x16, scores + position * 4) - splat(F32x16, top))
            weight = _within(position, first, end, weight, 0.0)
            total = total + weight
            store(scores + position * 4, cache.scale_values(weight, region, position, head_dim, padded))
        store(out, top)
        store(out + 4, lane_sum(total))

    def passes(some: QueryGroup) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The two passes over a page for some queries."""
        _, rows_of, zeros, add, store_all = some

        @inline
        def score(query, scores, i, last, region, begin, stop, head_dim):
            """Queries against 32 keys at a time."""
            queries, out = rows_of(query, i, last), rows_of(scores, i, last)
            for position in range(begin, stop, WIDE):
                low, high = zeros(), zeros()
                for at in range(head_dim):
                    k0, k1 = cache.read(region, key_block(position, at, head_dim))
                    low, high = add(low, queries, at * 4, k0), add(high, queries, at * 4, k1)
                store_all(out, position * 4, low, high)

        @inline
        def weigh(scores, parts, i, last, region, begin, stop, head_dim, padded):
            """Sums of weight * values over positions begin … stop - 1, 32 columns at a time."""
            weights, out = rows_of(scores, i, last), rows_of(parts, i, last)
            for column in range(0, padded, WIDE):
                low, high = zeros(), zeros()
                for position in range(begin, stop):
                    v0, v1 = cache.read(region, value_row(position, column, head_dim))
                    low, high = add(low, weights, position * 4, v0), add(high, weights, position * 4, v1)
                store_all(out, PARTIAL_HEADER + column * 4, low, high)

        return score, weigh

    score_few, weigh_few = passes(FOUR)
    score_group, weigh_group = passes(group)
    step = group.count

    @piece
    def attend(queries, query_bytes, token_bytes, tokens, heads, position, page, region, op, scores, out):
        head_dim, padded, out_bytes = op.head_dim, op.padded, op.partial_bytes
        count, score_bytes = tokens * heads, PAGE * 4
        begin = _first_in(page, position, op.seen) // WIDE * WIDE
        stop = (smaller(position - page + tokens, PAGE) + WIDE - 1) // WIDE * WIDE
        last, query = count - 1, (queries, query_bytes, heads, token_bytes)
        score, part = (scores, score_bytes, count, score_bytes), (out, out_bytes, count, out_bytes)
        for i in range(0, count, step):
            if step > 4 and count - i > 4:
                score_group(query, score, i, last, region, begin, stop, head_dim)
            else:
                score_few(query, score, i, last, region, begin, stop, head_dim)
        for i in range(count):
            own = position + i // heads
            first, end = _first_in(page, own, op.seen), smaller(own - page + 1, PAGE)
            weights = scores + i * score_bytes
            soften(weights, begin, stop, first, end, region, head_dim, padded, op.softcap, out + i * out_bytes)
        for i in range(0, count, step):
            if step > 4 and count - i > 4:
                weigh_group(score, part, i, last, region, begin, stop, head_dim, padded)
            else:
                weigh_few(score, part, i, last, region, begin, stop, head_dim, padded)

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
