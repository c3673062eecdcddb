"""Reads one map of a directory key by key: types, ranges, unknown keys. Knows no key's meaning.

Every refusal is a StructureError in one form: where, what was expected, what was found, what to do.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Collection
from typing import Any, NoReturn

from rkf.errors import StructureError
from rkf.format.constants import HASH_BYTES, MAX_NAME_BYTES

REMEDY = "the file is damaged or its writer is broken: fetch or convert it again"
U64_MAX = (1 << 64) - 1
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
Optional = Collection[str] | None


def refuse(where: str, expected: object, got: object) -> NoReturn:
    """Raise the StructureError for a value at `where`: what was expected, what was found."""
    raise StructureError(f"{where}: expected {expected}, got {got}; {REMEDY}")


def shown(value: Any) -> str:
    """A value from a file, escaped and shortened for a message."""
    return f"a map of {len(value)}" if isinstance(value, dict) else reprlib.repr(value)


def text(value: Any, where: str) -> str:
    """A name: 1 to MAX_NAME_BYTES bytes of UTF-8 without control characters."""
    if not isinstance(value, str) or not 0 < len(value.encode()) <= MAX_NAME_BYTES:
        refuse(where, f"a string of 1 to {MAX_NAME_BYTES} bytes", shown(value))
    if _CONTROL.search(value):
        refuse(where, "no control characters", shown(value))
    return value


def integer(value: Any, where: str, low: int = 0, high: int = U64_MAX) -> int:
    """An integer in low..high; a boolean is not one."""
    if type(value) is not int or not low <= value <= high:
        refuse(where, f"an integer from {low} to {high}", shown(value))
    return value


def number(value: Any, where: str) -> float:
    """A finite number; a boolean is not one."""
    if type(value) not in (int, float) or not math.isfinite(value):
        refuse(where, "a finite number", shown(value))
    return float(value)


class Fields:
    """One map. Opening it refuses keys that are neither required, optional (None: any key) nor `x-…`."""

    __slots__ = ("_map", "where")

    def __init__(self, value: Any, where: str, required: Collection[str], optional: Optional = ()) -> None:
        if not isinstance(value, dict):
            refuse(where, "a map", shown(value))
        for key in required:
            if key not in value:
                refuse(where, f"the key {key!r}", "none")
        if optional is not None and len(value) > len(required):
            for key in value:
                if key not in required and key not in optional and not key.startswith("x-"):
                    refuse(where, f"no key {shown(key)} (only x-… keys are free)", shown(value[key]))
        self._map: dict[str, Any] = value
        self.where = where

    def __contains__(self, key: str) -> bool:
        return key in self._map

    def at(self, key: str) -> str:
        """The place of a key, for messages."""
        return f"{self.where}, {key}"

    def raw(self, key: str) -> Any:
        return self._map[key]

    def inner(self, key: str, required: Collection[str], optional: Optional = ()) -> Fields:
        """The map at a key."""
        return Fields(self._map[key], self.at(key), required, optional)

    def integer(self, key: str, low: int = 0, high: int = U64_MAX) -> int:
        return integer(self._map[key], self.at(key), low, high)

    def text(self, key: str) -> str:
        return text(self._map[key], self.at(key))

    def choice(self, key: str, choices: Collection[Any]) -> Any:
        value = self._map[key]
        if not any(type(value) is type(choice) and value == choice for choice in choices):  # 32.0 is not 32, True not 1
            refuse(self.at(key), f"one of {', '.join(map(str, choices))}", shown(value))
        return value

    def number(self, key: str) -> float:
        return number(self._map[key], self.at(key))

    def flag(self, key: str) -> bool:
        value = self._map[key]
        if type(value) is not bool:
            refuse(self.at(key), "true or false", shown(value))
        return value

    def digest(self, key: str) -> bytes:
        value = self._map[key]
        if not isinstance(value, bytes) or len(value) != HASH_BYTES:
            refuse(self.at(key), f"a hash of {HASH_BYTES} bytes", shown(value))
        return value

    def list(self, key: str, longest: int) -> list[Any]:
        value = self._map[key]
        if not isinstance(value, list) or len(value) > longest:
            refuse(self.at(key), f"a list of at most {longest}", shown(value))
        return value

    def map(self, key: str) -> dict[str, Any]:
        value = self._map[key]
        if not isinstance(value, dict):
            refuse(self.at(key), "a map", shown(value))
        return value

    def numbers(self, key: str) -> dict[str, float]:
        """A map of finite numbers, without its x-… keys, which may hold anything."""
        inner = self.inner(key, (), None)
        found = {name: value for name, value in inner._map.items() if not name.startswith("x-")}
        for name in found:
            inner.number(name)
        return found
