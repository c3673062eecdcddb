"""A pass as each thread runs it: the plan's phases in order, whose items the threads share.

Only later phases read what a phase writes. A phase that every thread runs for itself (`own`) is small work before a
product; it costs less than waiting for another thread. Knows no op: each phase brings the kernel of its items.
"""

from __future__ import annotations

from numba import types

from rkf.runtime.kernels import sync
from rkf.runtime.kernels.inline import inline, smaller
from rkf.runtime.kernels.memory import call4, load, store, ticks
from rkf.runtime.kernels.operands import first_seen
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import BATCH, COUNTED, PAGE, PARTS, PHASE, PLAN, THREAD

_WHOLE_PAGES = 16  # with so many a thread, it takes all heads of a page, which lie side by side in memory
_PHASE_BYTES = PHASE.itemsize
_ONCE, _TOKENS, _BLOCKS, _PAGES, _SEGMENTS = range(len(COUNTED))
_OUTSIDE, _WAITING = PARTS.index("outside"), PARTS.index("waiting")


@inline
def _lap(part, thread):
    """If time is measured: count the time since the last lap towards this part."""
    if thread.clock != 0:
        now = ticks()
        slot = thread.clock + 8 + part * 8
        store(slot, load(types.int64, slot) + now - load(types.int64, thread.clock))
        store(thread.clock, now)


@inline
def _items(phase, batch, rows):
    """The number of items of a phase."""
    count = types.int64(1)
    if phase.counted == _TOKENS:
        count = rows
    elif phase.counted == _BLOCKS:
        count = batch.blocks
    elif phase.counted == _SEGMENTS:
        count = batch.segments
    elif phase.counted == _PAGES:
        count = batch.position // PAGE + 1 - first_seen(batch.position, phase.seen) // PAGE
    return count * phase.times


@inline
def _run_of(phase, items, threads):
    """How many neighbouring items a thread claims at once."""
    if phase.counted == _PAGES and items >= _WHOLE_PAGES * threads * phase.times:
        return phase.times
    return types.int64(1)


@inline
def _share(phase, items, run, slots, batch_address, thread_address, tag):
    """Run the items of a phase, claimed by the threads; returns the next phase's tag."""
    thread = view(THREAD, thread_address)
    first = sync.claim(slots, tag, items, run)
    while first >= 0:
        end = smaller(first + run, items)
        for item in range(first, end):
            call4(phase.work, item, phase.arguments, batch_address, thread_address)
        sync.finish(slots, tag, end - first)
        first = sync.claim(slots, tag, items, run)
    _lap(phase.part, thread)
    sync.wait(slots, tag, items)
    _lap(_WAITING, thread)
    return tag + 1


@inline
def _run(plan, phases, count, rows, batch_address, thread_address, tag):
    """Run some phases, for this number of rows; returns the tag after the last."""
    batch, thread = view(BATCH, batch_address), view(THREAD, thread_address)
    for index in range(count):
        phase = view(PHASE, phases + index * _PHASE_BYTES)
        if phase.own != 0:
            call4(phase.work, 0, phase.arguments, batch_address, thread_address)
            _lap(phase.part, thread)
        else:
            items = _items(phase, batch, rows)
            run = _run_of(phase, items, plan.threads)
            tag = _share(phase, items, run, plan.slots, batch_address, thread_address, tag)
    return tag


def step(plan_address, batch_address, thread_address, tag):
    """A pass: the layers for all tokens, then the top, or its beginning, for the wanted ones."""
    plan, batch, thread = view(PLAN, plan_address), view(BATCH, batch_address), view(THREAD, thread_address)
    _lap(_OUTSIDE, thread)
    phases, count = plan.many, plan.many_count
    if batch.tokens == 1:
        phases, count = plan.one, plan.one_count
    tag = _run(plan, phases, count, batch.tokens, batch_address, thread_address, tag)
    if batch.wanted == 0:
        return
    phases, count = plan.top_many, plan.top_many_count
    if batch.hidden != 0:
        phases, count = plan.hidden, plan.hidden_count
    elif batch.wanted == 1:
        phases, count = plan.top_one, plan.top_one_count
    _run(plan, phases, count, batch.wanted, batch_address, thread_address, tag)
