"""A worker thread between calls: run published calls, spin, yield the core, park. Knows no model.

A worker may reach a call after the others have finished it, or still be in it when the next one begins. So each worker
runs on a consistent copy of the call's batch. A sequence lock checks this: its number is the same before and after
copying. A late worker compares the phases with the item counts in its copy, finds every phase taken, and never
dereferences memory that the caller has released.
"""

from __future__ import annotations

from numba import types

from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.memory import add_shared, call4, exchange_shared, give_way, load, load_shared, pause, store
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import BATCH, CALL, CLOSED, PATIENCE, SPINS, WORKER, WRITING

_CALL_BATCH = CALL.fields["batch"][1]
_BATCH = WORKER.fields["batch"][1]
_BATCH_WORDS = BATCH.itemsize // 8
_SEEN = WORKER.fields["seen"][1]
_WAKE = WORKER.fields["wake"][1]
_WORKER_BYTES = WORKER.itemsize


@inline
def _copy_batch(source, target):
    for i in range(_BATCH_WORDS):
        store(target + i * 8, load(types.int64, source + i * 8))


def serve(worker, unused1, unused2, unused3):
    """Run published calls until none comes for a while, then set `parked` (the struct's first word)."""
    w = view(WORKER, worker)
    number, seen, idle = w.call, w.seen, 0
    while True:
        published = load_shared(number)
        if published == CLOSED:
            return
        if published != seen and published != WRITING:
            _copy_batch(number + _CALL_BATCH, worker + _BATCH)
            if add_shared(number, 0) != published:
                continue
            call4(w.step, w.plan, worker + _BATCH, w.thread, published)
            seen, idle = published, 0
            store(worker + _SEEN, seen)
        idle += 1
        if idle < SPINS:
            pause()
        elif idle < PATIENCE:
            give_way()
        elif exchange_shared(worker, 0, 1):
            # Parked, unless a call came in between; then the thread that takes the flag back decides.
            if add_shared(number, 0) == seen or not exchange_shared(worker, 1, 0):
                return
            idle = 0


def publish(call, number, workers, count):
    """Announce a call, and mark the parked workers that must be woken."""
    add_shared(call, WRITING - load_shared(call))
    _copy_batch(view(CALL, call).source, call + _CALL_BATCH)
    add_shared(call, number - WRITING)
    for index in range(count):
        worker = workers + index * _WORKER_BYTES
        if exchange_shared(worker, 1, 0):
            store(worker + _WAKE, 1)
