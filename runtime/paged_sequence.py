"""The tokens of one sequence on the CPU: pages of keys and values, states, and the earlier lengths to go back to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rkf.errors import UsageError
from rkf.model.frequencies import Frequencies
from rkf.runtime.kv_cache import CacheLayout, PageTable
from rkf.runtime.rope_choice import RopeChoice
from rkf.runtime.snapshots import Snapshots


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
