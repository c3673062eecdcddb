"""The tokens of one sequence on the CPU: pages of keys and values, states, and the earlier lengths to go back to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.errors import UsageError
from rkf.model.frequencies import Frequencies
from rkf.runtime.kv_cache import CacheLayout, PageTable
from rkf.runtime.rope_choice import RopeChoice
from rkf.runtime.snapshots import MOST, Snapshots
from rkf.runtime.structs import PAGE

# What `to_arrays` gives: dtype and number of axes by name. pages: the bytes of all; places: [pages, 2], the group and
# number of each; state, copies: of recurrent ops, and earlier ones, [copies, floats], of these lengths; numbers: the
# length of the last mark, and the positions by which ropes were chosen.
SEQUENCE_ARRAYS = {
    "pages": ("u1", 1),
    "places": ("i8", 2),
    "state": ("f4", 1),
    "copies": ("f4", 2),
    "lengths": ("i8", 1),
    "marks": ("i8", 1),
    "numbers": ("i8", 1),
}


class PagedSequence:
    """The tokens of one sequence as keys, values and states; it grows up to `capacity` tokens.

    words: i64[groups + ropes + 1], read by kernels: the addresses of page tables, rope tables and states.
    rope_choice: the choice of rope tables; named_ropes: the version of tables and the choice that `words` has.
    """

    def __init__(self, layout: CacheLayout, capacity: int, ropes: Sequence[Frequencies]) -> None:
        self.capacity = capacity
        self.length = 0
        self.rope_choice = RopeChoice(ropes)
        self.named_ropes = (0, 0)  # none yet
        self._layout, self._ropes = layout, ropes
        self._tables = [PageTable(group, capacity, layout.held) for group in layout.groups]
        tables = [table.addresses.ctypes.data for table in self._tables]
        self._states = self._counted(np.zeros(layout.state_bytes // 4, np.float32))
        self._steady = True  # the states are those after `length` tokens: no call was interrupted
        self._snapshots: Snapshots[NDArray[np.float32]] = Snapshots()
        self._mark = 0
        self.words: NDArray[np.int64] = np.array([*tables, *[0] * len(ropes), self._states.ctypes.data], np.int64)
        self.address = self.words.ctypes.data

    @property
    def rewinds(self) -> bool:
        """Whether it can go back to every length: there are no states and no windows."""
        return not self._states.size and all(group.window is None for group in self._layout.groups)

    @property
    def takes_back(self) -> bool:
        """Whether it can take back tokens of the last call. What the first one saw through a window is still there."""
        return not self._states.size

    def mark(self) -> None:
        """Let `truncate` go back to the present length later. The last marks count (snapshots.py)."""
        if self.length and self._steady:
            self._mark = self.length
            for table in self._tables:
                table.mark(self.length)
            if self._states.size:
                self._snapshots.keep(self.length, self._copy_of_states, marked=True)

    def truncate(self, tokens: int) -> None:
        """Keep only the first `tokens`. Raises UsageError for a length that it cannot go back to."""
        if not 0 <= tokens <= self.length or self.reusable(tokens) != tokens:
            raise UsageError(f"sequence: cannot keep {tokens} of {self.length} tokens")
        for table in self._tables:
            table.truncate(tokens)
        if self._states.size and not (tokens == self.length and self._steady):
            self._states[:] = self._snapshots.of(tokens) if tokens else 0
            self._steady = True
        self._snapshots.cut(tokens)
        self._mark = self._mark if self._mark <= tokens else 0
        self.length = tokens

    def reusable(self, tokens: int) -> int:
        """The longest beginning of at most `tokens` to which `truncate` can go back."""
        longest = self._with_states(min(tokens, self.length))
        if not self._seen_from(longest):  # a window has given back what it saw there; from its last mark it has not
            longest = self._with_states(min(tokens, self._mark))
        return longest if self._seen_from(longest) else 0

    def _with_states(self, tokens: int) -> int:
        """The longest length of at most `tokens` whose states are there."""
        now = tokens == self.length and self._steady
        return tokens if now or not self._states.size else self._snapshots.longest(tokens)

    def _seen_from(self, length: int) -> bool:
        return all(table.can_go_back_to(length) for table in self._tables)

    def fork(self) -> PagedSequence:
        """Another sequence with the same tokens. They share pages until one of the two writes to them."""
        other = PagedSequence(self._layout, self.capacity, self._ropes)
        for mine, its in zip(self._tables, other._tables, strict=True):
            mine.share_with(its)
        other.rope_choice = self.rope_choice.copy()
        other._states[:] = self._states
        other._snapshots, other._mark = self._snapshots.copy(), self._mark
        other.length, other._steady = self.length, self._steady
        return other

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """All of it but the tokens, for `from_arrays`; SEQUENCE_ARRAYS lists them."""
        pages = [(group, *page) for group, table in enumerate(self._tables) for page in table.contents().items()]
        copies = self._snapshots.copies
        return {
            "pages": np.concatenate([np.empty(0, np.uint8), *(content for *_, content in pages)]),
            "places": np.array([place for *place, _ in pages], np.int64).reshape(-1, 2),
            "state": self._states,
            "copies": np.array([*copies.values()], np.float32).reshape(len(copies), -1 if copies else 0),
            "lengths": np.array([*copies], np.int64),
            "marks": np.array(self._snapshots.marks, np.int64),
            "numbers": np.array([self._mark, self.rope_choice.positions], np.int64),
        }

    @classmethod
    def from_arrays(
        cls,
        layout: CacheLayout,
        capacity: int,
        ropes: Sequence[Frequencies],
        ids: NDArray[np.int64],
        arrays: Mapping[str, NDArray[Any]],
    ) -> PagedSequence:
        """A sequence of `ids` from the arrays of one. ValueError: no sequence of this layout has them."""
        made, length = cls(layout, capacity, ropes), len(ids)
        lengths, marks, numbers = (arrays[name].tolist() for name in ("lengths", "marks", "numbers"))
        _require(0 < length <= capacity, f"{length} tokens, expected 1 to {capacity}")
        _require(len(numbers) == 2 and min(numbers) >= 0 and max(numbers) <= capacity, f"numbers {numbers}")
        _require(all(each == sorted({*each}) and min(each, default=1) > 0 for each in (lengths, marks)), "lengths")
        _require(max([*lengths, *marks, numbers[0]]) <= length and len(lengths) <= MOST, f"lengths {lengths}, {marks}")
        size = made._states.size
        _require(arrays["state"].shape == (size,), f"a state of {arrays['state'].size} numbers, expected {size}")
        shape = (len(lengths), size if lengths else 0)
        _require(arrays["copies"].shape == shape, f"copies of states {arrays['copies'].shape}, expected {shape}")
        made._states[:] = arrays["state"]
        copies = {length: made._counted(copy.copy()) for length, copy in zip(lengths, arrays["copies"], strict=True)}
        made._snapshots, made._mark, made.length = Snapshots.of_copies(copies, marks), numbers[0], length
        made.rope_choice.resume(ids, numbers[1])
        made._fill(arrays["places"], arrays["pages"])
        for table in made._tables if made._mark else ():
            table.mark(made._mark)
        _require(made.reusable(length) == length, "pages are missing")
        return made

    def _fill(self, places: NDArray[np.int64], pages: NDArray[np.uint8]) -> None:
        """Put pages at their places, (group, number) each. ValueError: they have none."""
        _require(places.shape[1] == 2, f"places of {places.shape[1]} numbers")
        found = [tuple(place) for place in places.tolist()]
        _require(found == sorted({*found}), "pages are not in order")
        at, last = 0, (self.length - 1) // PAGE
        for group, number in found:
            _require(0 <= group < len(self._tables) and 0 <= number <= last, f"a page at {group}, {number}")
            end = at + self._layout.groups[group].page_bytes
            _require(end <= len(pages), "pages are cut short")
            self._tables[group].fill(number, pages[at:end])
            at = end
        _require(at == len(pages), "more bytes than pages")

    def growth_bytes(self, tokens: int) -> int:
        """The memory of the pages that so many more tokens take. Copies of states are not foretold."""
        return sum(table.growth_bytes(self.length, self.length + tokens) for table in self._tables)

    def tokens_again(self, new: NDArray[np.int64]) -> NDArray[np.int64]:
        """The held tokens if `new` ones take other rope tables; the sequence is then empty. Usually none."""
        again = self.rope_choice.again(self.length, new)
        if len(again):
            self.truncate(0)
        return again

    def name_ropes(self, addresses: Sequence[int], version: tuple[int, int]) -> None:
        """Write the addresses of rope tables into `words`."""
        self.words[len(self._tables) : -1] = addresses
        self.named_ropes = version

    def reserve(self, tokens: int) -> None:
        """Allocate pages for `tokens` more, and free those that no future token sees. `advance` must follow."""
        if not self._steady:
            before = self.reusable(self.length)
            raise UsageError(f"sequence: a call was interrupted, so its states are lost: truncate it to {before}")
        for table in self._tables:
            table.give_back(self.length)
            table.reserve(self.length, self.length + tokens)
        self._steady = not self._states.size

    def advance(self, tokens: int) -> None:
        """Count `tokens` that have been computed since `reserve`."""
        self.length += tokens
        self._steady = True
        if self._states.size and self._snapshots.due(self.length):
            self._snapshots.keep(self.length, self._copy_of_states)

    def _copy_of_states(self) -> NDArray[np.float32]:
        return self._counted(self._states.copy())

    def _counted(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        if states.size:
            self._layout.held.count(states)
        return states

    def __del__(self) -> None:
        for table in getattr(self, "_tables", ()):
            table.close()


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(f"damaged: {problem}")
