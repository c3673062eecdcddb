"""A local Ray cluster for tests."""

from collections.abc import Callable
from typing import TypeVar

import pytest

T = TypeVar("T")


def patiently(start: Callable[[], T]) -> T:
    """The result of `start`, tried twice. Ray gives up a node that takes 30 s to start, which cannot be changed: on a
    machine as busy as that, the test is skipped.
    """
    for _ in range(2):
        try:
            return start()
        except Exception as error:  # Ray raises this class itself
            if "timed out during startup" not in str(error):
                raise
    pytest.skip("this machine is too busy to start Ray within 30 s")
