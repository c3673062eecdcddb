"""Sequences whose beginnings other requests can share: those that run, and the last ones that ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rkf.runtime.backend import Backend

WORTHWHILE = 64  # tokens; a mark costs a pass of its own, about as long as computing eight tokens more
_BLOCK = 256  # ids compared at a time


class Held:
    """A backend's sequence, and the ids of which it holds the first `sequence.length`.

    coming: it will hold so many without anyone's help. marks: lengths at which it must be marked, ascending.
    """

    def __init__(self, sequence: Any, ids: list[int], coming: int = 0) -> None:
        self.sequence, self.ids, self.coming = sequence, ids, coming
        self.marks: list[int] = []


class Beginning(NamedTuple):
    """A sequence with the first ids of a text. shared: the longest beginning that any other text has in common with
    it. taken: the sequence was kept, and is no longer.
    """

    sequence: Any
    shared: int
    taken: bool = False


class Beginnings:
    """Finds, for new ids, the sequence with the longest common beginning; keeps the last `most` that ended."""

    def __init__(self, backend: Backend, capacity: int, most: int) -> None:
        self._backend, self._capacity, self._most = backend, capacity, most
        self._kept: list[Held] = []  # the longest unused first

    def keep(self, sequence: Any, ids: list[int]) -> None:
        """Keep a sequence that no request uses any more."""
        if sequence.length and self._most:
            self._kept.append(Held(sequence, ids[: sequence.length]))
            del self._kept[: -self._most]

    def last(self) -> Held | None:
        """The text that was kept last."""
        return self._kept[-1] if self._kept else None

    def drop_oldest(self) -> bool:
        """Free the longest unused sequence; False: none is kept."""
        if self._kept:
            del self._kept[0]
            return True
        return False

    def begin(self, ids: list[int], most: int, running: Sequence[Held]) -> Beginning | None:
        """A sequence for `ids` with what others hold of their beginning, `most` tokens of it at most.

        None: a running one will soon hold more of it; wait for that.
        """
        best, known, shared = None, 0, 0
        for held in [*self._kept, *running]:
            same = min(common(held.ids, ids), most)
            shared = max(shared, same)
            usable = held.sequence.reusable(min(same, held.sequence.length))
            if usable > known:
                best, known = held, usable
        for held in running:
            same = min(common(held.ids, ids), most, held.coming)
            if same - known >= WORTHWHILE and held.sequence.length < same:
                _mark_at(held, same)
                return None
        if best is None:
            return Beginning(self._backend.new_sequence(self._capacity), shared)
        if best in self._kept:
            self._kept.remove(best)
            if known == len(best.ids):  # nothing of it is lost
                return Beginning(best.sequence, shared, taken=True)
            self._kept.append(best)
        sequence = best.sequence.fork()
        sequence.truncate(known)
        return Beginning(sequence, shared)


def _mark_at(held: Held, length: int) -> None:
    """Have a running sequence marked at a length that it has not reached."""
    if not held.sequence.rewinds and length not in held.marks:
        held.marks = sorted([*held.marks, length])


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common beginning."""
    n = min(len(a), len(b))
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        if a[start:end] != b[start:end]:
            return next(i for i in range(start, end) if a[i] != b[i])
    return n
