"""A worker thread's life between calls: run what is published, spin, let others run, park. Knows no model."""

from __future__ import annotations

from rkf.runtime.kernels.simd import add_shared, call4, exchange_shared, give_way, load_shared, pause, store
from rkf.runtime.kernels.views import view
from rkf.runtime.layout import CLOSED, PATIENCE, PHASE_BITS, SPINS, WORKER

_SEEN = WORKER.fields["seen"][1]
_WAKE = WORKER.fields["wake"][1]
_WORKER_BYTES = WORKER.itemsize


def serve(worker, unused1, unused2, unused3):
    """Run published calls until there is none for a while; then `parked` (the struct's first word) is set."""
    w = view(WORKER, worker)
    number, seen, idle = w.call, w.seen, 0
    while True:
        published = load_shared(number)
        if published == CLOSED:
            return
        if published != seen:
            call4(w.step, w.plan, w.batch, w.thread, published << PHASE_BITS)
            seen, idle = published, 0
            store(worker + _SEEN, seen)
        idle += 1
        if idle < SPINS:
            pause()
        elif idle < PATIENCE:
            give_way()
        elif exchange_shared(worker, 0, 1):
            # Parked, unless a call came in between: then whoever takes the flag back decides.
            if add_shared(number, 0) == seen or not exchange_shared(worker, 1, 0):
                return
            idle = 0


def publish(call, number, workers, count):
    """Announce a call, and mark the parked workers, who must be woken."""
    add_shared(call, number - load_shared(call))
    for index in range(count):
        worker = workers + index * _WORKER_BYTES
        if exchange_shared(worker, 1, 0):
            store(worker + _WAKE, 1)
