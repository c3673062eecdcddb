"""Finds the special tokens that a conversation's own text spells, and breaks them with a mark. Knows no ids.

A template joins messages and special tokens into one string, in which a tokenizer finds special tokens by their text.
A mark inside those that a message spells survives the template, so that they can be told from the template's own.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

# Words that choose what a template writes. They are the caller's, not text; a mark would change their meaning.
_WORDS = ("role", "type")
_LONGEST = 256  # characters of a token's beginning that are looked for; a text that has them is taken to spell it
_LOOKED_AT = 4  # characters that tell places where no token can begin, in a fraction of the time


class Spelling:
    """The texts of a tokenizer's special tokens. One of a single character has no inside, so it is left out."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._known: list[str] = []  # sorted; where one that begins with another is spelt, so is the other
        for text in sorted({text[:_LONGEST] for text in texts if len(text) > 1}):
            if not self._known or not text.startswith(self._known[-1]):
                self._known.append(text)
        self._longest = max(map(len, self._known), default=0)
        width = min([_LOOKED_AT, *map(len, self._known)])
        classes = ["".join(map(re.escape, sorted({text[at] for text in self._known}))) for at in range(width)]
        first, *others = (f"[{each}]" for each in classes)
        self._first = re.compile(f"{first}(?={''.join(others)})" if self._known else "(?!)")

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
        return {start + 1 for start in starts if self._begins_at(text, start)}

    def _begins_at(self, text: str, start: int) -> bool:
        """Whether a token is spelt there: it is the last one that does not come after the text in their order."""
        at = bisect_right(self._known, text[start : start + self._longest])
        return at > 0 and text.startswith(self._known[at - 1], start)

    def _begun(self, text: str) -> set[int]:
        """Places in tokens that the end of the text begins: a template may trim it and append another text."""
        end = len(text.rstrip())
        starts = range(max(0, end - self._longest + 1), end)
        return {start + 1 for start in starts if self._begins(text[start:end])}

    def _begins(self, text: str) -> bool:
        at = bisect_left(self._known, text)
        return at < len(self._known) and self._known[at].startswith(text)
