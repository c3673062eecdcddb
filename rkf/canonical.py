"""Canonical msgpack: the one encoding of a directory. Knows no key's meaning.

Bytes are accepted only if they equal their own re-encoding: string keys in UTF-8 byte order, no duplicates, shortest
integers, float64 only (no NaN, no -0), no nil, no extension types, at most MAX_DEPTH maps and lists inside each other.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack

from rkf.errors import StructureError, UsageError
from rkf.format import MAX_DEPTH, MAX_DIRECTORY_BYTES

_LISTS = frozenset((*range(0x90, 0xA0), 0xDC, 0xDD))
_MAPS = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))


def encode(value: Any) -> bytes:
    """The canonical bytes of maps, lists, strings, bytes, integers, floats and booleans (a tuple counts as a list).

    Raises UsageError naming the place of what has no canonical form.
    """
    return msgpack.packb(_ordered(value, ""), use_bin_type=True)


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
        if encode(value) != data:
            raise StructureError("the bytes are not their own canonical msgpack encoding")
    except (msgpack.UnpackException, ValueError) as error:
        raise StructureError(
            f"not msgpack at byte {unpacker.tell()}: {type(error).__name__} {error}".rstrip()
        ) from None
    except UsageError as error:
        raise StructureError(f"not canonical msgpack: {error}") from None
    return value


def _read(unpacker: msgpack.Unpacker, data: bytes, depth: int) -> Any:
    start = unpacker.tell()
    first = data[start] if start < len(data) else None
    if first not in _LISTS and first not in _MAPS:
        return unpacker.unpack()
    if depth > MAX_DEPTH:
        raise StructureError(f"maps and lists are nested more than {MAX_DEPTH} deep at byte {start}")
    count = unpacker.read_array_header() if first in _LISTS else unpacker.read_map_header()
    if count > len(data) - start:
        raise StructureError(f"{count} items are declared at byte {start}, but only {len(data) - start} bytes remain")
    if first in _LISTS:
        return [_read(unpacker, data, depth + 1) for _ in range(count)]
    items: dict[str, Any] = {}
    for _ in range(count):
        key = _read(unpacker, data, depth + 1)
        if not isinstance(key, str):
            raise StructureError(f"a key of the map at byte {start} is not a string")
        if key in items:
            raise StructureError(f"the map at byte {start} has the key {key!r} twice")
        items[key] = _read(unpacker, data, depth + 1)
    return items


def _ordered(value: Any, where: str, depth: int = 1) -> Any:
    """The value with its keys sorted (code points order strings as their UTF-8 bytes do), or UsageError."""
    if isinstance(value, (bool, bytes)):
        return value
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise UsageError(f"{where or 'value'}: a lone surrogate is not UTF-8")
        return value
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 64:
            raise UsageError(f"{where or 'value'}: {value} does not fit 64 bits")
        return value
    if isinstance(value, float):
        if math.isnan(value) or (value == 0 and math.copysign(1, value) < 0):
            raise UsageError(f"{where or 'value'}: {value} has no canonical form")
        return float(value)
    if isinstance(value, (list, tuple, dict)) and depth > MAX_DEPTH:
        raise UsageError(f"{where}: maps and lists are nested more than {MAX_DEPTH} deep")
    if isinstance(value, (list, tuple)):
        return [_ordered(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _ordered(value[key], f"{where}.{key}" if where else key, depth + 1) for key in sorted(value)}
    raise UsageError(f"{where or 'value'}: {type(value).__name__} has no canonical form")
