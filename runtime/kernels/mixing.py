"""The phases of attention: writing keys and values, attention of heads over pages, and merging the pages' results.

With one token, each item is one group of heads over one page, and the results are merged afterwards. With several
tokens, each item is a block of neighbours and one group of heads over all pages that they see, page by page. Both merge
pages in order, so the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from rkf.runtime.kernels import attention
from rkf.runtime.kernels.cache_format import CacheFormat, cache_format
from rkf.runtime.kernels.inline import inline, smaller
from rkf.runtime.kernels.operands import first_seen, row_of, word
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import ATTENTION, BATCH, PAGE, THREAD


@inline
def _region(op, token, page, kv_head):
    """The address of a key head in a page of a token's sequence."""
    pages = word(word(op.sequences, token), op.group)
    return word(pages, page) + op.offset + kv_head * op.head_bytes


@inline
def _first_page(op, position):
    """The first page that attention from `position` sees."""
    return first_seen(position, op.seen) // PAGE


def remember(cache_name: str, level: str) -> Callable[..., Any]:
    """The micro-op that writes a token's keys and values into the cache."""
    write = cache_format(cache_name, level).remember

    def kernel(token, arguments, batch_address, thread_address):
        op, thread = view(ATTENTION, arguments), view(THREAD, thread_address)
        position, keys, values = word(op.positions, token), row_of(op.k, thread, token), row_of(op.v, thread, token)
        for head in range(op.kv_heads):
            region = _region(op, token, position // PAGE, head)
            key, value = keys + head * op.head_dim * 4, values + head * op.value_dim * 4
            write(region, position % PAGE, key, value, op.head_dim, op.value_dim, op.padded)

    return kernel


@cache
def _page_attention(cache_name: str, level: str, capped: bool) -> Callable[..., Any]:
    """Attention over one page for a cache format; both kinds of phase use it, so it is compiled once."""
    form: CacheFormat = cache_format(cache_name, level)
    attend = attention.page_attention(form, capped, 8 if level == "avx512" else 4)

    @inline
    def attend_page(op, token, tokens, kv_head, page, following, thread, out):
        """The queries of some neighbouring tokens, from `token` on, and of one group of heads, over one page.
        following: the region that is read next.
        """
        group, head_bytes = op.heads // op.kv_heads, op.head_dim * 4
        queries = row_of(op.q, thread, token) + kv_head * group * head_bytes
        position, region = word(op.positions, token), _region(op, token, page, kv_head)
        first, scores = page * PAGE, thread.scores
        attend(queries, head_bytes, op.q.stride, tokens, group, position, first, region, following, op, scores, out)

    return attend_page


def attend_one(cache_name: str, level: str, capped: bool) -> Callable[..., Any]:
    """One token: one group of heads over one page, written to the shared partial results."""
    attend_page = _page_attention(cache_name, level, capped)

    def kernel(item, arguments, batch_address, thread_address):
        op, batch, thread = view(ATTENTION, arguments), view(BATCH, batch_address), view(THREAD, thread_address)
        kv_head, page = item % op.kv_heads, item // op.kv_heads
        out = op.partials + (page * op.heads + kv_head * (op.heads // op.kv_heads)) * op.partial_bytes
        first, next_page, next_head = _first_page(op, batch.position), page, kv_head + 1
        if next_head == op.kv_heads:
            next_page, next_head = page + op.threads, 0
        following = _region(op, 0, smaller(first + next_page, batch.position // PAGE), next_head)
        attend_page(op, 0, 1, kv_head, first + page, following, thread, out)

    return kernel


def join(token, arguments, batch_address, thread_address):
    """The micro-op that merges the partial results of all pages that one token sees."""
    op, batch, thread = view(ATTENTION, arguments), view(BATCH, batch_address), view(THREAD, thread_address)
    total, out = thread.totals, row_of(op.out, thread, token)
    pages = batch.position // PAGE + 1 - _first_page(op, batch.position)
    for head in range(op.heads):
        attention.start(total, op.partial_bytes, op.sinks, head)
        for page in range(pages):
            attention.merge(total, op.partials + (page * op.heads + head) * op.partial_bytes, op.partial_bytes)
        attention.finish(total, out + head * op.value_dim * 4, op.value_dim)


def attend_many(cache_name: str, level: str, capped: bool) -> Callable[..., Any]:
    """A block of tokens and one group of heads over all pages that they see."""
    attend_page = _page_attention(cache_name, level, capped)

    def kernel(item, arguments, batch_address, thread_address):
        op, thread = view(ATTENTION, arguments), view(THREAD, thread_address)
        group, size = op.heads // op.kv_heads, op.partial_bytes
        kv_head, block = item % op.kv_heads, item // op.kv_heads
        token = word(op.blocks, block)
        tokens = word(op.blocks, block + 1) - token
        position, count = word(op.positions, token), tokens * group
        totals, parts = thread.totals, thread.parts
        for i in range(count):
            attention.start(totals + i * size, size, op.sinks, kv_head * group + i % group)
        last = (position + tokens - 1) // PAGE
        for page in range(_first_page(op, position), last + 1):
            following = _region(op, token, smaller(page + 1, last), kv_head)
            attend_page(op, token, tokens, kv_head, page, following, thread, parts)
            for i in range(count):
                attention.merge(totals + i * size, parts + i * size, size)
        for i in range(count):
            out = row_of(op.out, thread, token + i // group) + (kv_head * group + i % group) * op.value_dim * 4
            attention.finish(totals + i * size, out, op.value_dim)

    return kernel
