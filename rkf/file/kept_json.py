"""Kept files of JSON: one object with a version and a hash of the rest, so that any later change is noticed.

The hash is of the values, not of how they are spelt and spaced. Knows no contents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from blake3 import blake3

_KEPT = "kept"


def label(kind: str, value: Mapping[str, Any]) -> dict[str, list[str]]:
    """The member that makes `value` a kept object. kind: what it is and the version of its form, as "job 1"."""
    return {_KEPT: [kind, _digest(value)]}


def sealed(kind: str, value: Mapping[str, Any]) -> bytes:
    """A kept object as JSON."""
    return json.dumps({**label(kind, value), **value}).encode()


def opened(kind: str, data: bytes) -> dict[str, Any]:
    """The object in such a file. Raises ValueError, in one line, for whatever is not exactly that."""
    try:
        found = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    told = found.pop(_KEPT, None) if isinstance(found, dict) else None
    if not isinstance(told, list) or len(told) != 2:
        raise ValueError("it says no version")
    if told[0] != kind:
        raise ValueError(f"expected {kind}, got {told[0]!r}")
    if told[1] != _digest(found):
        raise ValueError("it does not match its hash")
    return found


def _digest(value: Mapping[str, Any]) -> str:
    whole = json.loads(json.dumps(value))  # tuples are lists, and keys are text, once they have been read back
    return blake3(json.dumps(whole, sort_keys=True).encode()).hexdigest()
