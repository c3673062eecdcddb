"""Finds the special tokens that a conversation's own text spells, and breaks them with a mark. Knows no ids.

A template joins messages and special tokens into one string, in which a tokenizer finds special tokens by their text.
A mark inside those that a message spells survives the template, so that they can be told from the template's own.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

# Words that choose what a template writes. They are the caller's, not text; a mark would change their meaning.
_WORDS = ("role", "type")
_LONGEST = 256  # characters of a token's beginning that are looked for at the end of a text


class Spelling:
    """The texts of a tokenizer's special tokens. One of a single character has no inside, so it is left out."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._known = {text for text in texts if len(text) > 1}
        self._sorted = sorted(self._known)
        self._longest = max(map(len, self._sorted), default=0)
        lengths: dict[str, set[int]] = {}
        for text in self._sorted:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = lengths
        firsts = "".join(map(re.escape, lengths))
        self._first = re.compile(f"[{firsts}]" if firsts else "(?!)")

    def broken(self, value: Any, mark: str) -> Any:
        """A JSON value with the mark behind the first character of every special token that its strings spell."""
        if isinstance(value, str):
            return self._broken(value, mark)
        if isinstance(value, Mapping):
            return {
                self._key(key, mark): each if key in _WORDS else self.broken(each, mark) for key, each in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.broken(each, mark) for each in value]
        return value

    def _key(self, key: Any, mark: str) -> Any:
        """Names that a template asks for are identifiers; others are names of a tool's arguments, and thus text."""
        return key if not isinstance(key, str) or key.isidentifier() else self._broken(key, mark)

    def _broken(self, text: str, mark: str) -> str:
        cuts = [0, *sorted(self._spelled(text) | self._begun(text)), len(text)]
        return mark.join(text[start:stop] for start, stop in pairwise(cuts))

    def _spelled(self, text: str) -> set[int]:
        """Places in tokens that the text spells."""
        starts = (found.start() for found in self._first.finditer(text))
        return {
            start + 1
            for start in starts
            if any(text[start : start + length] in self._known for length in self._lengths[text[start]])
        }

    def _begun(self, text: str) -> set[int]:
        """Places in tokens that the end of the text begins: a template may trim it and append another text."""
        end = len(text.rstrip())
        starts = range(max(0, end - min(self._longest, _LONGEST) + 1), end)
        return {start + 1 for start in starts if self._begins(text[start:end])}

    def _begins(self, text: str) -> bool:
        at = bisect_left(self._sorted, text)
        return at < len(self._sorted) and self._sorted[at].startswith(text)
