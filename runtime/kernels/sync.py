"""How threads share the phases of a call: they claim runs of neighbouring items, and a phase ends when all are done.

Phases are numbered over the life of a thread pool (`tag`), and each slot holds its phase's tag and a count. A thread
that slept through several phases finds newer tags, claims nothing and catches up. So no thread ever waits for a thread
that holds no item.
"""

from __future__ import annotations

from numba import types

from rkf.runtime.kernels.inline import inline, smaller
from rkf.runtime.kernels.memory import exchange_shared, give_way, load_shared, pause
from rkf.runtime.structs import CLAIM_SLOTS, COUNT_BITS, SLOT_BYTES, SPINS

_COUNT = (1 << COUNT_BITS) - 1


@inline
def claim(slots, tag, items, run):
    """The first of the next `run` items of a phase, or -1 if none is left."""
    slot = slots + tag % CLAIM_SLOTS * 2 * SLOT_BYTES
    while True:
        seen = load_shared(slot)
        count = types.int64(0)
        if seen >> COUNT_BITS == tag:
            count = seen & _COUNT
        if seen >> COUNT_BITS > tag or count >= items:
            return types.int64(-1)
        if exchange_shared(slot, seen, (tag << COUNT_BITS) + smaller(count + run, items)):
            return count


@inline
def finish(slots, tag, run):
    """Mark `run` claimed items as done; everything they wrote is visible to a thread that sees the phase end."""
    slot = slots + tag % CLAIM_SLOTS * 2 * SLOT_BYTES + SLOT_BYTES
    while True:
        seen = load_shared(slot)
        count = types.int64(0)
        if seen >> COUNT_BITS == tag:
            count = seen & _COUNT
        if exchange_shared(slot, seen, (tag << COUNT_BITS) + count + run):
            return


@inline
def wait(slots, tag, items):
    """Wait until all items of a phase are done: spin a little, then yield the core."""
    slot = slots + tag % CLAIM_SLOTS * 2 * SLOT_BYTES + SLOT_BYTES
    spins = 0
    while load_shared(slot) < (tag << COUNT_BITS) + items:
        spins += 1
        if spins < SPINS:
            pause()
        else:
            give_way()
