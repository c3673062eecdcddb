"""One forward pass of some tokens, as each thread runs it: the model's phases in order, and what one item of each does.

A phase's items are shared among threads (sync.py); what is written in a phase is read in later ones only. With one
token the small work before a product (norm, packing) is done by every thread for itself, which costs less than to wait
for another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels import activations, attention, sync
from rkf.runtime.kernels.cache_format import CacheFormat
from rkf.runtime.kernels.inline import inline, larger, piece, smaller
from rkf.runtime.kernels.memory import call3, call8, load, store, ticks
from rkf.runtime.kernels.simd import splat
from rkf.runtime.kernels.vectors import F32x16
from rkf.runtime.kernels.views import address_of, view
from rkf.runtime.structs import BATCH, JOB, LANES, LAYER, MATRIX, PAGE, PARTS, PLAN, THREAD

_JOB_BYTES, _LAYER_BYTES = JOB.itemsize, LAYER.itemsize
_OUTSIDE, _EMBEDDING, _NORMS, _QKV, _ROPE, _ATTENTION, _OUTPUT, _GATE_UP, _DOWN, _HEAD, _WAITING = range(len(PARTS))


@inline
def _word(address, index):
    return load(types.int64, address + index * 8)


@inline
def _float(address, index):
    return load(types.float32, address + index * 4)


@inline
def _add(address, index, value):
    store(address + index * 4, _float(address, index) + value)


@inline
def _lap(part, thread):
    """Where somebody measures: the time since the last lap went into this part."""
    if thread.clock != 0:
        now = ticks()
        slot = thread.clock + 8 + part * 8
        store(slot, load(types.int64, slot) + now - load(types.int64, thread.clock))
        store(thread.clock, now)


@inline
def _share(part, work, items, plan, batch, layer, thread, tag):
    """All items of a phase, by whoever claims them; returns the next phase's tag."""
    item = sync.claim(plan.slots, tag, items)
    while item >= 0:
        work(item, plan, batch, layer, thread)
        sync.finish(plan.slots, tag)
        item = sync.claim(plan.slots, tag, items)
    _lap(part, thread)
    sync.wait(plan.slots, tag, items)
    _lap(_WAITING, thread)
    return tag + 1


@inline
def _each_token(part, work, plan, batch, layer, thread, tag):
    """Work by token: shared, or for a single token done by every thread for itself."""
    if batch.tokens == 1:
        work(types.int64(0), plan, batch, layer, thread)
        _lap(part, thread)
        return tag
    return _share(part, work, batch.tokens, plan, batch, layer, thread, tag)


@inline
def _own_or_shared(own, shared, batch):
    """Which ACTIVATION the products of this call read."""
    if batch.tokens == 1:
        return own
    return shared


# --- products


@inline
def _add_exceptions(m, values, out, begin, end):
    """What a token's rows lack of exceptions begin … end - 1: token by token, so that its vectors stay in the cache."""
    rows, columns, deltas = m.exception_row, m.exception_column, m.exception_delta
    for exception in range(begin, end):
        row = types.int64(load(types.int32, rows + exception * 4))
        column = types.int64(load(types.int32, columns + exception * 4))
        _add(out, row, _float(deltas, exception) * _float(values, column))


@piece
def _finish_rows(m, x, tokens, y, y_stride, low, high):
    """What a fast product leaves out: the exceptions' deltas, and the bias."""
    for token in range(tokens):
        values, out = x.values + token * x.values_stride, y + token * y_stride
        if m.exception_delta != 0:
            _add_exceptions(m, values, out, _word(m.exception_start, low), _word(m.exception_start, high))
        if m.bias != 0:
            for row in range(low, high):
                _add(out, row, _float(m.bias, row))


@piece
def _multiply(matrix, x, tokens, y, y_stride, low, high, scratch):
    """y[token, row] = row of the matrix times activation x of the token, for rows low … high - 1."""
    m = view(MATRIX, matrix)
    kernel = m.multiply_many
    if tokens == 1:
        kernel = m.multiply_one
    call8(kernel, matrix, address_of(x), tokens, y, y_stride, low, high, scratch)
    _finish_rows(m, x, tokens, y, y_stride, low, high)


@piece
def _query_key_value(item, plan, batch, layer, thread):
    job = view(JOB, layer.qkv.jobs + item * _JOB_BYTES)
    x = _own_or_shared(thread.norm_input, plan.norm_input, batch)
    y = plan.qkv + job.output
    _multiply(job.matrix, x, batch.tokens, y, plan.qkv_stride, job.low, job.high, thread.scratch)


@inline
def _add_product(job, x, plan, batch, thread):
    """residual stream += matrix times x."""
    _multiply(job.matrix, x, batch.tokens, plan.delta, plan.delta_stride, job.low, job.high, thread.scratch)
    for token in range(batch.tokens):
        target, delta = plan.x + token * plan.x_stride, plan.delta + token * plan.delta_stride
        for at in range(job.low * 4, job.high * 4, LANES * 4):  # both are padded, and zero past the last row
            store(target + at, load(F32x16, target + at) + load(F32x16, delta + at))


@piece
def _output(item, plan, batch, layer, thread):
    x = _own_or_shared(thread.mixed_input, plan.mixed_input, batch)
    _add_product(view(JOB, layer.output.jobs + item * _JOB_BYTES), x, plan, batch, thread)


@piece
def _down(item, plan, batch, layer, thread):
    x = _own_or_shared(thread.feed_input, plan.feed_input, batch)
    _add_product(view(JOB, layer.down.jobs + item * _JOB_BYTES), x, plan, batch, thread)


@piece
def _gate_up(item, plan, batch, layer, thread):
    """feed_input = silu(gate) * up for the same rows of both matrices."""
    job = view(JOB, layer.gate_up.jobs + item * _JOB_BYTES)
    x, tokens, stride = _own_or_shared(thread.norm_input, plan.norm_input, batch), batch.tokens, plan.gate_up_stride
    gate, up, out = plan.gate_up, plan.gate_up + job.output, plan.feed_input
    _multiply(job.matrix, x, tokens, gate, stride, job.low, job.high, thread.scratch)
    _multiply(job.partner, x, tokens, up, stride, job.low, job.high, thread.scratch)
    for token in range(tokens):
        begin = token * stride + job.low * 4
        target = out.values + token * out.values_stride + job.low * 4
        activations.swiglu(gate + begin, up + begin, target, job.high - job.low)


@piece
def _logits(item, plan, batch, layer, thread):
    job = view(JOB, plan.head.jobs + item * _JOB_BYTES)
    tokens, x = types.int64(1), thread.norm_input
    if batch.all_logits != 0:
        tokens, x = batch.tokens, _own_or_shared(thread.norm_input, plan.norm_input, batch)
    _multiply(job.matrix, x, tokens, batch.logits, batch.logits_stride, job.low, job.high, thread.scratch)


# --- the residual stream and attention


@piece
def _embed(item, plan, batch, layer, thread):
    call3(
        view(MATRIX, plan.embedding).decode_row, plan.embedding, _word(batch.ids, item), plan.x + item * plan.x_stride
    )


@inline
def _rotate(head, cosines, half, scale):
    """Rope on pairs (i, i + head_dim / 2), as Hugging Face orders them, times a scale; the sines follow the cosines."""
    whole = half // LANES * LANES
    for i in range(0, whole, LANES):
        a, b = load(F32x16, head + i * 4), load(F32x16, head + (i + half) * 4)
        cosine, sine = load(F32x16, cosines + i * 4), load(F32x16, cosines + (i + half) * 4)
        factor = splat(F32x16, scale)
        store(head + i * 4, (a * cosine - b * sine) * factor)
        store(head + (i + half) * 4, (b * cosine + a * sine) * factor)
    for i in range(whole, half):
        a, b = _float(head, i), _float(head, i + half)
        cosine, sine = _float(cosines, i), _float(cosines, i + half)
        store(head + i * 4, (a * cosine - b * sine) * scale)
        store(head + (i + half) * 4, (b * cosine + a * sine) * scale)


@inline
def _prepare_head(head, norm, cosines, scale, plan):
    """A query or key head, in place: its norm (where the model has one), then rope."""
    if norm != 0:
        activations.head_norm(head, norm, plan.head_dim, plan.epsilon)
    _rotate(head, cosines, plan.head_dim // 2, scale)


@inline
def _region(plan, layer, pages, page, kv_head):
    """Where a page of the cache holds a layer's key head."""
    return _word(pages, page) + (layer.index * plan.kv_heads + kv_head) * plan.head_bytes


@inline
def _first_visible(plan, position):
    """The first position that attention from `position` sees."""
    if plan.window == 0:
        return types.int64(0)
    return larger(position - plan.window + 1, types.int64(0))


def step(level: str, cache: CacheFormat) -> Callable[..., Any]:
    """The pass for a level of CPU and a format of the cache."""
    pack = activations.packer(level)
    attend = attention.page_attention(cache)
    write = cache.remember

    @piece
    def remember(item, plan, batch, layer, thread):
        """Queries and keys of a token get their position; its keys and values go to the cache."""
        position = _word(batch.positions, item)
        cosines = batch.rope + position * plan.head_dim * 4
        head_bytes, queries = plan.head_dim * 4, plan.qkv + item * plan.qkv_stride
        for head in range(plan.heads):
            _prepare_head(queries + head * head_bytes, layer.q_norm, cosines, plan.query_scale, plan)
        for head in range(plan.kv_heads):
            key = queries + (plan.heads + head) * head_bytes
            _prepare_head(key, layer.k_norm, cosines, types.float32(1), plan)
            region = _region(plan, layer, _word(batch.pages, item), position // PAGE, head)
            value = key + plan.kv_heads * head_bytes
            write(region, position % PAGE, key, value, plan.head_dim, plan.padded_head_dim)

    @piece
    def attend_page(item, tokens, kv_head, page, plan, batch, layer, thread, out):
        """The queries of some neighbouring tokens, first `item`, and of one group of heads, over one page."""
        group, head_bytes = plan.heads // plan.kv_heads, plan.head_dim * 4
        attend(
            plan.qkv + item * plan.qkv_stride + kv_head * group * head_bytes,
            head_bytes,
            plan.qkv_stride,
            tokens,
            group,
            _word(batch.positions, item) - page * PAGE,
            plan.window,
            _region(plan, layer, _word(batch.pages, item), page, kv_head),
            plan.head_dim,
            plan.padded_head_dim,
            thread.scores,
            out,
            plan.partial_bytes,
        )

    @piece
    def mix_one(item, plan, batch, layer, thread):
        """One token: one group of heads over one page, to the shared partial results."""
        kv_head, page = item % plan.kv_heads, item // plan.kv_heads
        out = plan.partials + (page * plan.heads + kv_head * (plan.heads // plan.kv_heads)) * plan.partial_bytes
        attend_page(types.int64(0), types.int64(1), kv_head, batch.first_page + page, plan, batch, layer, thread, out)

    @piece
    def join_one(item, plan, batch, layer, thread):
        """One token: the partial results of all pages put together, packed for the output matrix."""
        total = thread.totals
        for head in range(plan.heads):
            attention.start(total, plan.partial_bytes)
            for page in range(batch.page_count):
                part = plan.partials + (page * plan.heads + head) * plan.partial_bytes
                attention.merge(total, part, plan.partial_bytes)
            attention.finish(total, thread.mixed_input.values + head * plan.head_dim * 4, plan.head_dim)
        pack(thread.mixed_input, types.int64(0))

    @piece
    def mix_many(item, plan, batch, layer, thread):
        """A block of tokens and one group of heads over all pages that they see, page by page."""
        group = plan.heads // plan.kv_heads
        kv_head, token = item % plan.kv_heads, item // plan.kv_heads * batch.block
        tokens = smaller(batch.tokens - token, batch.block)
        position, count = _word(batch.positions, token), tokens * group
        totals, parts, size = thread.totals, thread.parts, plan.partial_bytes
        for i in range(count):
            attention.start(totals + i * size, size)
        for page in range(_first_visible(plan, position) // PAGE, (position + tokens - 1) // PAGE + 1):
            attend_page(token, tokens, kv_head, page, plan, batch, layer, thread, parts)
            for i in range(count):
                attention.merge(totals + i * size, parts + i * size, size)
        for i in range(count):
            out = plan.mixed_input.values + (token + i // group) * plan.mixed_input.values_stride
            attention.finish(totals + i * size, out + (kv_head * group + i % group) * plan.head_dim * 4, plan.head_dim)

    @piece
    def pack_mixed(item, plan, batch, layer, thread):
        pack(plan.mixed_input, item)

    @inline
    def normalise(token, slot, weight, target, plan):
        """target[slot] = RMSNorm of a token's residual stream, packed."""
        x, out = plan.x + token * plan.x_stride, target.values + slot * target.values_stride
        activations.rms_norm(x, weight, out, plan.hidden, plan.epsilon)
        pack(target, slot)

    @piece
    def attention_norm(item, plan, batch, layer, thread):
        normalise(item, item, layer.attention_norm, _own_or_shared(thread.norm_input, plan.norm_input, batch), plan)

    @piece
    def feed_norm(item, plan, batch, layer, thread):
        normalise(item, item, layer.feed_norm, _own_or_shared(thread.norm_input, plan.norm_input, batch), plan)

    @piece
    def final_norm(item, plan, batch, layer, thread):
        normalise(item, item, plan.final_norm, _own_or_shared(thread.norm_input, plan.norm_input, batch), plan)

    @piece
    def pack_feed(item, plan, batch, layer, thread):
        pack(_own_or_shared(thread.feed_input, plan.feed_input, batch), item)

    @inline
    def mix(plan, batch, layer, thread, tag):
        if batch.tokens > 1:
            items = (batch.tokens + batch.block - 1) // batch.block * plan.kv_heads
            tag = _share(_ATTENTION, mix_many, items, plan, batch, layer, thread, tag)
            return _share(_ATTENTION, pack_mixed, batch.tokens, plan, batch, layer, thread, tag)
        tag = _share(_ATTENTION, mix_one, plan.kv_heads * batch.page_count, plan, batch, layer, thread, tag)
        join_one(types.int64(0), plan, batch, layer, thread)
        _lap(_ATTENTION, thread)
        return tag

    def kernel(plan_address, batch_address, thread_address, tag):
        plan, batch, thread = view(PLAN, plan_address), view(BATCH, batch_address), view(THREAD, thread_address)
        layer = view(LAYER, plan.layers)
        _lap(_OUTSIDE, thread)
        tag = _share(_EMBEDDING, _embed, batch.tokens, plan, batch, layer, thread, tag)
        for index in range(plan.layer_count):
            layer = view(LAYER, plan.layers + index * _LAYER_BYTES)
            tag = _each_token(_NORMS, attention_norm, plan, batch, layer, thread, tag)
            tag = _share(_QKV, _query_key_value, layer.qkv.count, plan, batch, layer, thread, tag)
            tag = _share(_ROPE, remember, batch.tokens, plan, batch, layer, thread, tag)
            tag = mix(plan, batch, layer, thread, tag)
            tag = _share(_OUTPUT, _output, layer.output.count, plan, batch, layer, thread, tag)
            tag = _each_token(_NORMS, feed_norm, plan, batch, layer, thread, tag)
            tag = _share(_GATE_UP, _gate_up, layer.gate_up.count, plan, batch, layer, thread, tag)
            tag = _each_token(_NORMS, pack_feed, plan, batch, layer, thread, tag)
            tag = _share(_DOWN, _down, layer.down.count, plan, batch, layer, thread, tag)
        if batch.logits == 0:
            return
        if batch.all_logits != 0:
            tag = _each_token(_NORMS, final_norm, plan, batch, layer, thread, tag)
        else:
            normalise(batch.tokens - 1, types.int64(0), plan.final_norm, thread.norm_input, plan)
            _lap(_NORMS, thread)
        _share(_HEAD, _logits, plan.head.count, plan, batch, layer, thread, tag)

    return kernel
