"""A clock that counts training steps, so that the outcome does not depend on how busy the machine is."""

from itertools import count

import pytest

from rkf.tune import loop

TICK_S = 0.05  # the loop asks twice a step: a tenth of a second each


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch):
    ticks = count()
    monkeypatch.setattr(loop, "monotonic", lambda: TICK_S * next(ticks))
