"""Damage decided by a string of bytes, so that a fuzzer can steer it and a corpus can repeat it. Knows no format."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any


class Choices:
    """Integers read from bytes; 0 once these are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __call__(self, n: int) -> int:
        """An integer from 0 to n - 1."""
        length = max(1, ((n - 1).bit_length() + 7) // 8)
        piece = self._data[self._at : self._at + length]
        self._at += length
        return int.from_bytes(piece, "little") % n

    def rest(self) -> bytes:
        return self._data[self._at :]


REMOVED = object()
# Values that have broken readers of JSON before: other types, limits of integers and floats, odd texts.
ODD: tuple[Any, ...] = (
    *(REMOVED, None, True, False, 0, 1, -1, 2, 255, 256, 1 << 31, (1 << 32) - 1, 1 << 63, -(1 << 63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "a", "false", "1", "\x00", "\ud800", "é" * 300, "../x", "[" * 2000, [], [0], [[0]], [None], ["a"], [1] * 300),
    *({}, {"a": 1}, {"type": "a"}, {"": None}),
)
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 31, 32, 33, 63, 64, 127, 128, 255, 256, 65535, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63)


def damaged_json(value: Any, draw: Choices) -> Any:
    """One to three values replaced by an odd one, by the value of another place, or removed."""
    value = deepcopy(value)
    for _ in range(1 + draw(3)):
        paths = list(_paths(value))
        if not paths:
            return value
        path = paths[draw(len(paths))]
        new = _at(value, paths[draw(len(paths))]) if draw(4) == 0 else ODD[draw(len(ODD))]
        node = _at(value, path[:-1])
        if new is REMOVED:
            del node[path[-1]]
        else:
            node[path[-1]] = deepcopy(new)
    return value


def damaged_bytes(data: bytes, draw: Choices) -> bytes:
    """One to four changes: bytes or integers overwritten, pieces cut out, repeated or moved, the end cut off."""
    found = bytearray(data)
    for _ in range(1 + draw(4)):
        at, length = draw(len(found) + 1), 1 + draw(16)
        match draw(6):
            case 0:
                found[at : at + 1] = bytes([draw(256)])
            case 1:
                width = (1, 2, 4, 8)[draw(4)]
                number = NUMBERS[draw(len(NUMBERS))] & ((1 << 8 * width) - 1)
                found[at : at + width] = number.to_bytes(width, "little")
            case 2:
                del found[at : at + length]
            case 3:
                found[at:at] = found[at : at + length]
            case 4:
                start = draw(len(found) + 1)
                found[at : at + length] = found[start : start + length]
            case _:
                del found[at:]
    return bytes(found)


def _paths(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place below the top; of long lists only the ends."""
    if path:
        yield path
    if isinstance(node, dict):
        keys = list(node)
    elif isinstance(node, list):
        keys = sorted({*range(min(len(node), 8)), *range(max(0, len(node) - 2), len(node))})
    else:
        return
    for key in keys if len(keys) < 64 else [*keys[:32], *keys[-32:]]:
        yield from _paths(node[key], (*path, key))


def _at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key]
    return node
