"""Ropes with other frequencies for long texts: which ones a sequence uses, and what it then computes again.

A text that outgrows a rope's original context takes the long frequencies at all its positions. So its tokens are all
computed again at that point, once, as transformers does. The other way round too, if the text is cut and goes on
shorter. The logits of a text's last token thus depend on the text alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from rkf.model.frequencies import Frequencies

I64 = NDArray[np.int64]
NONE: I64 = np.empty(0, np.int64)


class RopeChoice:
    """The frequencies of one sequence's ropes. Where none of them has long ones, it keeps no tokens.

    positions: the length of the text, by which each rope chooses; number: how many ropes' original contexts it exceeds.
    """

    def __init__(self, ropes: Iterable[Frequencies]) -> None:
        contexts = {rope.original_context for rope in ropes if rope.long is not None}
        self._contexts = sorted(each for each in contexts if each is not None)
        self._ids: list[int] = []
        self.positions = self.number = 0

    def again(self, length: int, new: I64) -> I64:
        """Choose for `new` tokens after `length` others: all of those if they must be computed again, usually none."""
        if not self._contexts:
            return NONE
        del self._ids[length:]
        held = np.array(self._ids, np.int64)
        self._ids += new.tolist()
        before, self.positions = self.number, len(self._ids)
        self.number = bisect_left(self._contexts, self.positions)
        return NONE if self.number == before else held

    def resume(self, ids: I64, positions: int) -> None:
        """Go on with a text whose ropes were chosen for so many positions."""
        if self._contexts:
            self._ids, self.positions = ids.tolist(), positions
            self.number = bisect_left(self._contexts, positions)

    def copy(self) -> RopeChoice:
        """The same choice, for a fork."""
        other = RopeChoice(())
        other._contexts, other._ids = self._contexts, self._ids.copy()
        other.positions, other.number = self.positions, self.number
        return other
