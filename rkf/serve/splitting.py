"""The parts of an answer, and how a text falls into them at markers while it arrives. Knows no markers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from rkf.runtime.generate import StopStrings
from rkf.serve.call_forms import Call


class Parts(NamedTuple):
    """What a piece of text adds to the parts of an answer."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


class Splitter(ABC):
    """Splits the text of one answer. Text that may begin a marker is held back."""

    def __init__(self) -> None:
        self._content, self._thoughts = "", ""  # since the last call of push
        self._calls: list[Call] = []
        self._ends = StopStrings([])  # the markers that end the present part

    @property
    @abstractmethod
    def reasons(self) -> bool:
        """Whether the text so far ends within the reasoning."""

    def push(self, text: str) -> Parts:
        """The parts that `text` adds."""
        while True:
            self._add(self._ends.push(text))
            if not self._ends.found:
                return self._taken()
            marker, text = self._ends.cut()
            self._enter(marker)

    def finish(self) -> Parts:
        """The rest, once no text comes any more."""
        self._add(self._ends.finish())
        self._end()
        return self._taken()

    @abstractmethod
    def _add(self, text: str) -> None:
        """Add text to the present part."""

    @abstractmethod
    def _enter(self, marker: str) -> None:
        """End the present part at a marker, and begin the next."""

    @abstractmethod
    def _end(self) -> None:
        """End the last part."""

    def _taken(self) -> Parts:
        found = Parts(self._content, self._thoughts, tuple(self._calls))
        self._content, self._thoughts, self._calls = "", "", []
        return found
