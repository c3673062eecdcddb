"""Text of unknown origin on a terminal. Knows no stream."""

from __future__ import annotations

import re

# C0 and C1 without tab and line feed, separators of lines, and the controls of bidirectional text.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """`text` with every character that could control a terminal (control, direction and format characters) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def masked(text: str) -> str:
    """`harmless`, with one replacement character for each escaped one, so that places in the text stay."""
    return _CONTROLS.sub("\ufffd", text)


def harmless(text: str) -> str:
    """`text` in which line breaks and tabs are the only characters left that control a terminal or the direction of
    text; the joiners that scripts and emoji need stay.
    """
    return _CONTROLS.sub(lambda found: printable(found[0]), text)
