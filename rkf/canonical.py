"""Canonical msgpack: the one encoding of a directory. Knows no key's meaning.

Bytes are accepted only if they equal their own re-encoding: string keys in UTF-8 byte order, no duplicates, shortest
integers, float64 only (finite, no -0), no nil, no extension types, at most MAX_DEPTH maps and lists inside each other.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import msgpack

from rkf.errors import StructureError, UsageError
from rkf.format import MAX_DEPTH, MAX_DIRECTORY_BYTES

_LISTS = frozenset((*range(0x90, 0xA0), 0xDC, 0xDD))
_MAPS = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
_FLOAT64 = 0xCB
# What has no canonical form, by its first byte.
_REFUSED = {
    0xC0: "nil",
    0xC1: "an unused code",
    **dict.fromkeys((*range(0xC7, 0xCA), *range(0xD4, 0xD9)), "an extension"),
}


def encode(value: Any) -> bytes:
    """The canonical bytes of maps, lists, strings, bytes, integers, floats and booleans (a tuple counts as a list).

    Raises UsageError naming the place of what has no canonical form.
    """
    return msgpack.packb(_ordered(value, (), 1), use_bin_type=True)


def decode(data: bytes) -> Any:
    """The value that `data` is the canonical encoding of; StructureError for anything else.

    Lists and maps are entered one by one, so that a count is compared to the bytes that remain before memory is taken
    for it, and depth is bounded.
    """
    if not 0 < len(data) <= MAX_DIRECTORY_BYTES:
        raise StructureError(f"expected 1 to {MAX_DIRECTORY_BYTES} bytes of msgpack, got {len(data)}")
    unpacker = msgpack.Unpacker(max_buffer_size=len(data))
    unpacker.feed(data)
    try:
        value = _read(unpacker, data, 1)
    except (msgpack.UnpackException, ValueError) as error:
        problem = str(error) or type(error).__name__
        raise StructureError(f"expected msgpack, got at byte {unpacker.tell()}: {problem}") from None
    if msgpack.packb(value, use_bin_type=True) != data:
        raise StructureError("expected canonical msgpack, got bytes that differ from their own re-encoding")
    return value


def _read(unpacker: msgpack.Unpacker, data: bytes, depth: int) -> Any:
    start = unpacker.tell()
    first = data[start] if start < len(data) else None
    if first in _LISTS or first in _MAPS:
        if depth > MAX_DEPTH:
            raise StructureError(f"expected maps and lists at most {MAX_DEPTH} deep, got more at byte {start}")
        return _read_list(unpacker, data, depth) if first in _LISTS else _read_map(unpacker, data, depth)
    if first in _REFUSED:
        raise StructureError(f"expected a canonical value at byte {start}, got {_REFUSED[first]}")
    value = unpacker.unpack()
    if first == _FLOAT64 and not _is_canonical(value):
        raise StructureError(f"expected a canonical number at byte {start}, got {value}")
    return value


def _read_list(unpacker: msgpack.Unpacker, data: bytes, depth: int) -> list[Any]:
    count = unpacker.read_array_header()
    _check_count(count, unpacker, data)
    return [_read(unpacker, data, depth + 1) for _ in range(count)]


def _read_map(unpacker: msgpack.Unpacker, data: bytes, depth: int) -> dict[str, Any]:
    count = unpacker.read_map_header()
    _check_count(2 * count, unpacker, data)
    items: dict[str, Any] = {}
    previous = None
    for _ in range(count):
        key = _read(unpacker, data, depth + 1)
        if not isinstance(key, str):
            raise StructureError(f"expected strings as keys, got {type(key).__name__} before byte {unpacker.tell()}")
        if previous is not None and key <= previous:
            problem = "twice" if key == previous else f"after {previous!r}"
            raise StructureError(f"expected keys in order, each once, got {key!r} {problem}")
        items[key] = _read(unpacker, data, depth + 1)
        previous = key
    return items


def _check_count(count: int, unpacker: msgpack.Unpacker, data: bytes) -> None:
    if count > len(data) - unpacker.tell():
        left = len(data) - unpacker.tell()
        raise StructureError(f"expected at most {left} more items, as many as bytes remain, got a count of {count}")


def _is_canonical(value: float) -> bool:
    """Finite, and no negative zero."""
    return math.isfinite(value) and not (value == 0 and math.copysign(1, value) < 0)


def _ordered(value: Any, where: tuple[Any, ...], depth: int) -> Any:
    """The value with its keys sorted (code points order strings as their UTF-8 bytes do), or UsageError."""
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
