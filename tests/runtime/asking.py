"""Requests to an engine, for tests."""

import numpy as np

from rkf.runtime.engine import Request


class Recorded(Request):
    """A greedy request that keeps the logits from which its tokens were chosen."""

    def __init__(self, ids, most, **options):
        self.logits = []
        super().__init__(list(ids), self._choose, most, **options)

    def _choose(self, logits, ids):
        self.logits.append(logits.copy())
        return int(np.argmax(logits))


def run(engine, request):
    """Its new tokens, one by one as a reader that keeps up takes them."""
    engine.submit(request)
    found = []
    while not request.ended:
        engine.step()
        found += request.take()
    return found + request.take()


def next_logits(engine, ids):
    """Logits after all of `ids`: f32[vocab]."""
    request = Recorded(ids, len(ids) + 1)
    run(engine, request)
    return request.logits[0]
