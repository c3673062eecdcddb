"""Attention of a few neighbouring tokens, and the query heads that share a key head, over one page of the cache.

Keys and values are read once for eight of these queries, or for four. Each page yields (maximum, sum, weighted values)
per query. They are merged in page order, so the result depends neither on the thread of each page nor on the tokens
computed together.

Meanwhile the region that is read next comes into the second-level cache: three quarters of it with the reads of this
one, the rest while scores become weights, so that memory is never idle (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import types

from rkf.runtime.kernels.activations import constant, exponential, hyperbolic_tangent
from rkf.runtime.kernels.cache_format import CacheFormat, key_block, keys_apart, value_row
from rkf.runtime.kernels.inline import inline, larger, piece, smaller
from rkf.runtime.kernels.memory import load, prefetch, store
from rkf.runtime.kernels.operands import first_seen
from rkf.runtime.kernels.simd import first_lane, lane_maximum, lane_sum, lanes_below, maximum, select, splat
from rkf.runtime.kernels.vectors import MASK16, F32x16
from rkf.runtime.structs import LANES, PAGE, PARTIAL_HEADER, SPAN, WIDE

_LOWEST = -1e30
_FAINTEST = -60.0  # of a score below the maximum: e^-60 times a scale is no subnormal number, which would be slow
_LINE = 64  # bytes of a line of the caches
_SCALE = 8  # bytes of a partial result before the scale of the query's scores


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
    """rows(address, bytes, i, last): the addresses of `count` rows from the i-th on, `bytes` apart; past the last, it
    repeats.

    zeros() -> sums; add(sums, rows, offset, x): sums + the factors at each row + offset, times x; store_scores(rows,
    offset, low, high): the sums of 32 positions; add_span(rows, column, span, low, high): to the totals of 32 columns,
    those of a span.
    """

    count: int
    rows: Callable[..., Any]
    zeros: Callable[..., Any]
    add: Callable[..., Any]
    store_scores: Callable[..., Any]
    add_span: Callable[..., Any]


def _four(cache: CacheFormat) -> QueryGroup:
    zero, one_more, finish, finish_span = cache.zero, cache.add, cache.finish, cache.finish_span

    @inline
    def rows(address, size, i, last):
        return (
            address + i * size,
            address + smaller(i + 1, last) * size,
            address + smaller(i + 2, last) * size,
            address + smaller(i + 3, last) * size,
        )

    @inline
    def zeros():
        return zero(), zero(), zero(), zero()

    @inline
    def add(sums, rows, offset, x):
        return (
            one_more(sums[0], rows[0] + offset, x),
            one_more(sums[1], rows[1] + offset, x),
            one_more(sums[2], rows[2] + offset, x),
            one_more(sums[3], rows[3] + offset, x),
        )

    @inline
    def store_scores(rows, offset, low, high):
        """A row that repeats is stored more than once, with the same values."""
        _store_pair(rows[0] + offset, WIDE, finish(low[0]), finish(high[0]))
        _store_pair(rows[1] + offset, WIDE, finish(low[1]), finish(high[1]))
        _store_pair(rows[2] + offset, WIDE, finish(low[2]), finish(high[2]))
        _store_pair(rows[3] + offset, WIDE, finish(low[3]), finish(high[3]))

    @inline
    def _added(row, column, span, low, high):
        totals = row + PARTIAL_HEADER + column * 4
        return (
            finish_span(low, load(F32x16, totals), row, span),
            finish_span(high, load(F32x16, totals + LANES * 4), row, span),
        )

    @inline
    def add_span(rows, column, span, low, high):
        """All are read before any is stored, because a row may repeat."""
        a = _added(rows[0], column, span, low[0], high[0])
        b = _added(rows[1], column, span, low[1], high[1])
        c = _added(rows[2], column, span, low[2], high[2])
        d = _added(rows[3], column, span, low[3], high[3])
        _store_pair(rows[0] + PARTIAL_HEADER + column * 4, LANES, a[0], a[1])
        _store_pair(rows[1] + PARTIAL_HEADER + column * 4, LANES, b[0], b[1])
        _store_pair(rows[2] + PARTIAL_HEADER + column * 4, LANES, c[0], c[1])
        _store_pair(rows[3] + PARTIAL_HEADER + column * 4, LANES, d[0], d[1])

    return QueryGroup(4, rows, zeros, add, store_scores, add_span)


def _eight(cache: CacheFormat) -> QueryGroup:
    """For CPUs with 32 registers. Only the last four may repeat, so each half can be added by itself."""
    _, rows_of, zeros_of, add_to, store_of, add_span_of = _four(cache)

    @inline
    def rows(address, size, i, last):
        return rows_of(address, size, i, last), rows_of(address, size, smaller(i + 4, last), last)

    @inline
    def zeros():
        return zeros_of(), zeros_of()

    @inline
    def add(sums, rows, offset, x):
        return add_to(sums[0], rows[0], offset, x), add_to(sums[1], rows[1], offset, x)

    @inline
    def store_scores(rows, offset, low, high):
        store_of(rows[0], offset, low[0], high[0])
        store_of(rows[1], offset, low[1], high[1])

    @inline
    def add_span(rows, column, span, low, high):
        add_span_of(rows[0], column, span, low[0], high[0])
        add_span_of(rows[1], column, span, low[1], high[1])

    return QueryGroup(8, rows, zeros, add, store_scores, add_span)


def page_attention(cache: CacheFormat, capped: bool, most: int) -> Callable[..., Any]:
    """attend(queries, query_bytes, token_bytes, tokens, heads, position, page, region, following, op, scores, out).

    queries: f32[head_dim] each, already scaled, of neighbouring tokens and of heads that share a key head; position:
    the first token's (it may be past the page); page: the page's first position; region: the head's in the page;
    following: the region that is read next; op: the ATTENTION; scores: op.score_bytes of scratch a query, f32[256] and
    the query as factors; out: a partial result per query, op.partial_bytes apart: maximum, sum (f32), then f32[padded]
    at PARTIAL_HEADER. capped: scores are softcap * tanh(score / softcap). most: the queries at a time, 8 or 4; up to
    four are taken as four.
    """

    @inline
    def plain_score(x, softcap):
        return x

    @inline
    def capped_score(x, softcap):
        cap = splat(F32x16, softcap)
        return cap * hyperbolic_tangent(x / cap)

    finished = capped_score if capped else plain_score
    step, factor, span = cache.step, cache.factor_bytes, cache.span

    @inline
    def weight(scores, position, first, end, top):
        below = maximum(load(F32x16, scores + position * 4) - splat(F32x16, top), constant(_FAINTEST))
        return _within(position, first, end, exponential(below), 0.0)

    @inline
    def value_weight(x, position, first, end, region, head_dim, padded):
        """Masked once more: nothing is known of the scales of positions that are not written yet."""
        return _within(position, first, end, cache.scale_values(x, region, position, head_dim, padded), 0.0)

    @inline
    def soften(scores, scale, begin, stop, first, end, region, head_dim, padded, softcap, out):
        """Turn scores of positions begin … stop - 1 into weights: e^(score - maximum) from first to end - 1, else 0.
        Starts the query's partial result.
        """
        highest = constant(_LOWEST)
        for position in range(begin, stop, LANES):
            x = load(F32x16, scores + position * 4) * splat(F32x16, scale)
            x = finished(cache.scale_keys(x, region, position, head_dim, padded), softcap)
            store(scores + position * 4, x)
            highest = maximum(highest, _within(position, first, end, x, _LOWEST))
        top = lane_maximum(highest)
        total = constant(0.0)
        for position in range(begin, stop, SPAN):
            a = weight(scores, position, first, end, top)
            b = weight(scores, position + LANES, first, end, top)
            c = weight(scores, position + 2 * LANES, first, end, top)
            d = weight(scores, position + 3 * LANES, first, end, top)
            total = total + ((a + b) + (c + d))
            a = value_weight(a, position, first, end, region, head_dim, padded)
            b = value_weight(b, position + LANES, first, end, region, head_dim, padded)
            c = value_weight(c, position + 2 * LANES, first, end, region, head_dim, padded)
            d = value_weight(d, position + 3 * LANES, first, end, region, head_dim, padded)
            cache.weights(scores, position, a, b, c, d, out)
        store(out, top)
        store(out + 4, lane_sum(total))
        for column in range(0, padded, LANES):
            store(out + PARTIAL_HEADER + column * 4, constant(0.0))

    def passes(some: QueryGroup) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The two passes over a page for some queries."""
        _, rows_of, zeros, add, store_scores, add_span = some

        @inline
        def score(queries, scores, size, i, last, keys, ahead, begin, stop, head_dim):
            """Queries against 32 keys at a time, positions p … p + 15 and p + 32 … p + 47."""
            query, out = rows_of(queries, size, i, last), rows_of(scores, size, i, last)
            for block in range(begin // LANES, stop // LANES, 2):
                position = block // 4 * SPAN + block // 2 % 2 * LANES
                low, high = zeros(), zeros()
                for at in range(0, head_dim, step):
                    at_key = key_block(position, at, head_dim)
                    k0, k1 = cache.read_keys(keys, at_key, keys_apart(head_dim), ahead)
                    low, high = add(low, query, at * factor, k0), add(high, query, at * factor, k1)
                store_scores(out, position * 4, low, high)

        @inline
        def weigh(scores, size, parts, part_size, i, last, values, ahead, begin, stop, padded):
            """Sums of weight * values over positions begin … stop - 1, 32 columns at a time."""
            weights, out = rows_of(scores, size, i, last), rows_of(parts, part_size, i, last)
            for column in range(0, padded, WIDE):
                for first in range(begin, stop, span):
                    low, high = zeros(), zeros()
                    for position in range(first, smaller(stop, first + span), step):
                        at_value = value_row(position, column)
                        v0, v1 = cache.read_values(values, at_value, PAGE * LANES, ahead)
                        low, high = add(low, weights, position * factor, v0), add(high, weights, position * factor, v1)
                    add_span(out, column, first // span, low, high)

        return score, weigh

    score_few, weigh_few = passes(_four(cache))
    score_group, weigh_group = passes(_eight(cache)) if most == 8 else (score_few, weigh_few)

    @piece
    def attend(queries, query_bytes, token_bytes, tokens, heads, position, page, region, following, op, scores, out):
        head_dim, padded, size, part_size = op.head_dim, op.padded, op.score_bytes, op.partial_bytes
        count, factors, values = tokens * heads, scores + PAGE * 4, cache.values(region, head_dim)
        ahead_of_values = following + (values - region) * 3 // 4
        rest = following + (cache.scales(region, head_dim, padded) - region) * 3 // 4
        last = count - 1
        begin = _first_in(page, position, op.seen) // SPAN * SPAN
        stop = (smaller(position - page + tokens, PAGE) + SPAN - 1) // SPAN * SPAN
        for i in range(count):
            query = queries + i % heads * query_bytes + i // heads * token_bytes
            store(out + i * part_size + _SCALE, cache.query(query, factors + i * size, head_dim))
        for i in range(0, count, most):
            if most > 4 and count - i > 4:
                score_group(factors, scores, size, i, last, region, following, begin, stop, head_dim)
            else:
                score_few(factors, scores, size, i, last, region, following, begin, stop, head_dim)
        for i in range(count):
            if stop - begin == PAGE:  # of a part of a page, most would not be read
                for line in range(rest + i * _LINE, following + op.head_bytes, count * _LINE):
                    prefetch(line, 2)
            own = position + i // heads
            first, end = _first_in(page, own, op.seen), smaller(own - page + 1, PAGE)
            part, scale = out + i * part_size, load(types.float32, out + i * part_size + _SCALE)
            soften(scores + i * size, scale, begin, stop, first, end, region, head_dim, padded, op.softcap, part)
        for i in range(0, count, most):
            if most > 4 and count - i > 4:
                weigh_group(scores, size, out, part_size, i, last, values, ahead_of_values, begin, stop, padded)
            else:
                weigh_few(scores, size, out, part_size, i, last, values, ahead_of_values, begin, stop, padded)

    return attend


@inline
def _store_pair(address, apart, a, b):
    store(address, a)
    store(address + apart * 4, b)


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
