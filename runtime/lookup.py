"""Guesses the next tokens of a text: what followed the last three tokens before (prompt lookup), or what a draft says.

A guess changes no text: the engine computes guessed tokens together and keeps those that are chosen anyway. It pays
where an answer repeats its prompt, as edited code does, because a pass of a few tokens reads the weights once. Saxena
2023 (prompt lookup decoding), Leviathan et al. 2023 (speculative decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rkf.runtime.draft import DraftText

_MATCH = 3  # tokens that must have occurred before
_MOST = 8  # a pass of nine tokens takes about three times that of one, so nine correct guesses in a row are 3 x
_PAUSE = 16  # tokens without a guess after a wrong one, doubled each time: a wrong guess of four costs most of a token


class Guesses:
    """Guesses for one text that only grows: from its own past, which costs nothing, otherwise from a draft."""

    def __init__(self, draft: DraftText | None = None) -> None:
        self._lookup, self._draft = PromptLookup(), draft

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """The tokens that may follow `ids`, which begin with those of the last call; often none."""
        return self._lookup(ids) or ([] if self._draft is None else self._draft(ids))


class PromptLookup:
    """Guesses for one text that only grows."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}  # the last tokens -> the place after them
        self._known = 0  # ids in _places
        self._size, self._pause, self._next = 2, _PAUSE, 0
        self._guess: list[int] = []
        self._guessed_at = 0

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """The tokens that may follow `ids`, which begin with those of the last call; often none."""
        self._learn(ids)
        for end in range(max(self._known, _MATCH), len(ids)):
            self._places[tuple(ids[end - _MATCH : end])] = end
        self._known = len(ids)
        place = self._places.get(tuple(ids[-_MATCH:]))
        if place is not None and len(ids) >= self._next:
            self._guess, self._guessed_at = list(ids[place : place + self._size]), len(ids)
        return self._guess

    def _learn(self, ids: Sequence[int]) -> None:
        """Guess more after a guess that came true, and pause after one that did not."""
        came = list(ids[self._guessed_at : self._guessed_at + len(self._guess)])
        if not came:
            return
        if came == self._guess:
            self._size, self._pause = min(2 * self._size, _MOST), _PAUSE
        elif came[0] != self._guess[0]:
            self._size, self._next, self._pause = 2, len(ids) + self._pause, 2 * self._pause
        self._guess = []
