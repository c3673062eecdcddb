"""Earlier lengths of a sequence that its recurrent states can go back to. Knows no states, only that they are kept.

Tokens cannot be taken out of a state, so going back needs a copy from earlier. Copies come from marks (the engine sets
one where texts part) and, between them, after every 256 tokens. Memory is bounded: at most eight copies are kept, the
last two marks among them, and the others thinned to a geometric progression of lengths. So going back anywhere computes
at most about two thirds of that beginning again, and short ones, such as a system prompt that many texts share, stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

SPACING = 256  # tokens; about what a pass computes
MOST = 8  # 19 MB each with 18 delta rules at 0.8 B weights, 0.2 MB with short convolutions alone; llama.cpp: up to 32
_MARKS = 2

State = TypeVar("State")


class Snapshots(Generic[State]):
    """Copies of a sequence's states by its length. A copy is never changed, so forks share it."""

    def __init__(self) -> None:
        self._states: dict[int, State] = {}  # by ascending length
        self._marks: list[int] = []  # the lengths that were marked, ascending

    def due(self, length: int) -> bool:
        """Whether the tokens since the last copy are worth another one."""
        return length - next(reversed(self._states), 0) >= SPACING

    def keep(self, length: int, copy: Callable[[], State], *, marked: bool = False) -> None:
        """Add the copy of a length, unless it is there; no other may be longer."""
        if marked and length not in self._marks:
            self._marks.append(length)
        if length not in self._states:
            self._states[length] = copy()
        if len(self._states) > MOST:
            del self._states[self._least_missed()]

    def longest(self, tokens: int) -> int:
        """The longest length with a copy, of at most `tokens`; 0, the empty sequence, needs none."""
        return next((length for length in reversed(self._states) if length <= tokens), 0)

    def of(self, length: int) -> State:
        """The copy of a length that `longest` gave, but 0."""
        return self._states[length]

    def cut(self, tokens: int) -> None:
        """Drop the copies of more than `tokens`."""
        self._states = {length: state for length, state in self._states.items() if length <= tokens}
        self._marks = [length for length in self._marks if length <= tokens]

    @property
    def copies(self) -> Mapping[int, State]:
        """All copies, by ascending length."""
        return self._states

    @property
    def marks(self) -> Sequence[int]:
        """The lengths that were marked, ascending."""
        return self._marks

    @classmethod
    def of_copies(cls, copies: Mapping[int, State], marks: Sequence[int]) -> Snapshots[State]:
        """Those with these copies and marks, which another one had."""
        found = cls()
        found._states, found._marks = dict(sorted(copies.items())), sorted(marks)
        return found

    def copy(self) -> Snapshots[State]:
        """The same copies, for a fork."""
        return Snapshots.of_copies(self._states, self._marks)

    def _least_missed(self) -> int:
        """The length whose neighbours are the closest, as a ratio; neither the last marks nor the newest."""
        lengths = [SPACING // 2, *self._states]
        stay = {*self._marks[-_MARKS:], lengths[-1]}
        near = zip(lengths, lengths[1:], lengths[2:], strict=False)
        return min((longer / shorter, length) for shorter, length, longer in near if length not in stay)[1]
