"""Canonical msgpack: the one encoding of a directory. Knows no key's meaning.

Bytes are accepted only if they equal their own re-encoding: string keys in UTF-8 byte order, no duplicates, shortest
integers, float64 only (finite, no -0), no nil, no extension types, maps and lists nested at most MAX_DEPTH deep.
"""

from __future__ import annotations

import math
import reprlib
import sys
from typing import Any, NoReturn

import msgpack

from rkf.errors import StructureError, UsageError
from rkf.format.constants import MAX_CONTAINERS, MAX_DEPTH, MAX_DIRECTORY_BYTES, MAX_VALUES

_LISTS = frozenset((*range(0x90, 0xA0), 0xDC, 0xDD))
_MAPS = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
_FLOAT64 = 0xCB
# First bytes of values without a canonical form.
_REFUSED = {
    0xC0: "nil",
    0xC1: "an unused code",
    **dict.fromkeys((*range(0xC7, 0xCA), *range(0xD4, 0xD9)), "an extension"),
}


def encode(value: Any) -> bytes:
    """The canonical bytes of maps, lists, strings, bytes, integers, floats and booleans (a tuple counts as a list).

    Raises UsageError that names the place of a value without a canonical form.
    """
    return msgpack.packb(_ordered(value, (), 1), use_bin_type=True)


def decode(data: bytes) -> Any:
    """The value whose canonical encoding is `data`; StructureError for anything else.

    Lists and maps are entered one by one. So each count is compared with the remaining bytes before memory is allocated
    for it, and depth is bounded.
    """
    if not 0 < len(data) <= MAX_DIRECTORY_BYTES:
        raise StructureError(f"expected 1 to {MAX_DIRECTORY_BYTES} bytes of msgpack, got {len(data)}")
    reader = _Reader(data)
    try:
        value = reader.read(1)
    except (msgpack.UnpackException, ValueError) as error:
        problem = str(error) or type(error).__name__
        raise StructureError(f"expected msgpack, got at byte {reader.tell()}: {problem}") from None
    if msgpack.packb(value, use_bin_type=True) != data:
        raise StructureError("expected canonical msgpack, got bytes that differ from their own re-encoding")
    return value


class _Reader:
    """Reads values in order. It counts maps and lists, because an empty one takes 64 times its byte in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._unpacker = msgpack.Unpacker(max_buffer_size=len(data))
        self._unpacker.feed(data)
        self._containers = 0
        self._values = 0

    def tell(self) -> int:
        return self._unpacker.tell()

    def read(self, depth: int) -> Any:
        start = self.tell()
        first = self._data[start] if start < len(self._data) else None
        if first in _LISTS or first in _MAPS:
            self._enter(depth)
            return self._read_list(depth) if first in _LISTS else self._read_map(depth)
        self._values += 1
        if self._values > MAX_VALUES:
            raise StructureError(f"expected at most {MAX_VALUES} values, got more at byte {start}")
        if first in _REFUSED:
            raise StructureError(f"expected a canonical value at byte {start}, got {_REFUSED[first]}")
        value = self._unpacker.unpack()
        if first == _FLOAT64 and not _is_canonical(value):
            raise StructureError(f"expected a canonical number at byte {start}, got {value}")
        return value

    def _enter(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise StructureError(f"expected maps and lists at most {MAX_DEPTH} deep, got more at byte {self.tell()}")
        self._containers += 1
        if self._containers > MAX_CONTAINERS:
            raise StructureError(f"expected at most {MAX_CONTAINERS} maps and lists, got more at byte {self.tell()}")

    def _read_list(self, depth: int) -> list[Any]:
        count = self._unpacker.read_array_header()
        self._check_count(count)
        return [self.read(depth + 1) for _ in range(count)]

    def _read_map(self, depth: int) -> dict[str, Any]:
        count = self._unpacker.read_map_header()
        self._check_count(2 * count)
        items: dict[str, Any] = {}
        previous = None
        for _ in range(count):
            key = self.read(depth + 1)
            self._values -= 1  # a key does not count
            if not isinstance(key, str):
                raise StructureError(f"expected strings as keys, got {type(key).__name__} before byte {self.tell()}")
            if previous is not None and key <= previous:
                problem = "twice" if key == previous else f"after {reprlib.repr(previous)}"
                raise StructureError(f"expected keys in order, each once, got {reprlib.repr(key)} {problem}")
            items[sys.intern(key)] = self.read(depth + 1)  # else half a million small maps hold as many copies of a key
            previous = key
        return items

    def _check_count(self, count: int) -> None:
        left = len(self._data) - self.tell()
        if count > left:
            raise StructureError(f"expected at most {left} more items, as many as bytes remain, got a count of {count}")


def _is_canonical(value: float) -> bool:
    """Finite, and no negative zero."""
    return math.isfinite(value) and not (value == 0 and math.copysign(1, value) < 0)


def _ordered(value: Any, where: tuple[Any, ...], depth: int) -> Any:
    """The value with its keys sorted (code point order equals UTF-8 byte order), or UsageError."""
    if isinstance(value, (bool, bytes)):
        return value
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            _refuse(where, "a lone surrogate")
        return value
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 64:
            _refuse(where, f"{value}, which does not fit 64 bits")
        return value
    if isinstance(value, float):
        if not _is_canonical(value):
            _refuse(where, value)
        return float(value)
    if isinstance(value, (list, tuple, dict)) and depth > MAX_DEPTH:
        _refuse(where, f"maps and lists more than {MAX_DEPTH} deep")
    if isinstance(value, (list, tuple)):
        return [_ordered(item, (*where, i), depth + 1) for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {_ordered(key, where, 1): _ordered(value[key], (*where, key), depth + 1) for key in sorted(value)}
    _refuse(where, f"a {type(value).__name__}" + (" with keys that are not strings" if isinstance(value, dict) else ""))


def _refuse(where: tuple[Any, ...], got: object) -> NoReturn:
    place = ".".join(map(str, where)) or "value"
    raise UsageError(f"{place}: expected maps, lists, strings, bytes, booleans, 64-bit integers or floats, got {got}")
