"""A local Ray cluster for tests. Ray gives up a node that takes 30 s to start, which happens on a crowded machine."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def patiently(start: Callable[[], T]) -> T:
    """The result of `start`, tried up to three times."""
    for _ in range(2):
        try:
            return start()
        except Exception as error:  # Ray raises this class itself
            if "timed out during startup" not in str(error):
                raise
    return start()
