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


class Spelling:
    """The texts of a tokenizer's special tokens. One of a single character has no inside, so it is left out."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = sorted({text for text in texts if len(text) > 1})
        self._longest = max(map(len, self._texts), default=0)
        rests: dict[str, list[str]] = {}
        for text in self._texts:
            rests.setdefault(text[0], []).append(re.escape(text[1:]))
        parts = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()]
        self._pattern = re.compile("|".join(parts) or "(?!)")

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
        places = {found.end() for found in self._pattern.finditer(text)} | self._begun(text)
        cuts = [0, *sorted(places), len(text)]
        return mark.join(text[start:stop] for start, stop in pairwise(cuts))

    def _begun(self, text: str) -> set[int]:
        """Places in tokens that the end of the text begins: a template may trim it and append another text."""
        end = len(text.rstrip())
        starts = range(max(0, end - self._longest + 1), end)
        return {start + 1 for start in starts if self._begins(text[start:end])}

    def _begins(self, text: str) -> bool:
        at = bisect_left(self._texts, text)
        return at < len(self._texts) and self._texts[at].startswith(text)
