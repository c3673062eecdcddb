"""Ops and ropes as maps of a directory, and back: keys, types, limits (spec/program.md). Knows no whole program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field
from typing import Any

from rkf.errors import UnsupportedError
from rkf.format.fields import Fields, number, refuse, shown
from rkf.model.frequencies import Frequencies
from rkf.model.op import Op, keys, kind_of
from rkf.model.ops import OPS

MAX_OPS = 4096  # of the stem, all kinds and the top together
MAX_LAYERS = 4096
MAX_ROPES = 256
MAX_FREQUENCIES = 4096
MAX_SIZE = (1 << 31) - 1  # for sizes in ops and for the width of a value
# Runtimes use f32 for the numbers of ops and ropes. None may exceed the largest f32; positive ones must be normal.
MAX_NUMBER = float.fromhex("0x1.fffffep+127")
MIN_POSITIVE = float.fromhex("0x1p-126")


class OpReader:
    """Reads lists of ops, and limits their total number to that of a program."""

    def __init__(self, ropes: int) -> None:
        self._left, self._ropes = MAX_OPS, ropes

    def ops(self, items: Any, where: str) -> tuple[Op, ...]:
        where = f"program, {where}"
        if not isinstance(items, list) or len(items) > self._left:
            refuse(where, f"a list of ops, at most {MAX_OPS} in the whole program", shown(items))
        self._left -= len(items)
        return tuple(self._op(item, f"{where}, op {number}") for number, item in enumerate(items))

    def _op(self, item: Any, where: str) -> Op:
        kind = OPS[Fields(item, where, ("op",), None).choice("op", tuple(OPS))]
        required = [key.name for key in keys(kind) if key.default is MISSING]
        optional = [key.name for key in keys(kind) if key.default is not MISSING]
        if "dst" in item:
            where = f"{where}, {kind.name!r} that writes {shown(item['dst'])}"
        found = Fields(item, where, ("op", *required), optional)
        return kind(**{key.name: self._read(found, key) for key in keys(kind) if key.name in found})

    def _read(self, found: Fields, key: Field[Any]) -> Any:
        match kind_of(key):
            case "value" | "tensor":
                return found.text(key.name)
            case "size":
                return found.integer(key.name, 1, MAX_SIZE)
            case "number":
                return _number(found.raw(key.name), found.at(key.name), key.metadata["above"])
            case "flag":
                return found.flag(key.name)
            case "choice":
                return found.choice(key.name, key.metadata["choices"])
            case "rope":
                return found.integer(key.name, 0, self._ropes - 1)
            case _:  # "layer"
                return found.integer(key.name, 0, MAX_LAYERS - 1)


def _number(value: Any, where: str, above: float | None = None) -> float:
    found = number(value, where)
    if abs(found) > MAX_NUMBER:
        refuse(where, f"a number of at most {MAX_NUMBER:g}, either sign", value)
    if above is not None and found < MIN_POSITIVE:
        refuse(where, f"a number of at least {MIN_POSITIVE:g}", value)
    return found


def rope_from_map(item: Any, where: str) -> Frequencies:
    """The rope of a map; `rope_map` is the inverse."""
    found = Fields(item, where, ("frequencies",), ("factor", "long", "original_context"))
    frequencies = _frequencies(found, "frequencies")
    long = _frequencies(found, "long") if "long" in found else None
    if (long is None) != ("original_context" not in found):
        refuse(where, "long and original_context, or neither", "one")
    if long is not None and len(long) != len(frequencies):
        refuse(found.at("long"), f"{len(frequencies)} frequencies", len(long))
    return Frequencies(
        frequencies,
        _number(found.raw("factor"), found.at("factor"), 0) if "factor" in found else 1.0,
        long,
        found.integer("original_context", 1, MAX_SIZE) if long is not None else None,
    )


def _frequencies(found: Fields, key: str) -> tuple[float, ...]:
    items = found.list(key, MAX_FREQUENCIES)
    if not items:
        refuse(found.at(key), "at least one frequency", "none")
    numbers = tuple(_number(item, found.at(key)) for item in items)
    if min(numbers) < 0:
        refuse(found.at(key), "numbers of at least 0", min(numbers))
    return numbers


def op_map(op: Op) -> dict[str, Any]:
    """The map of an op, without keys at their default."""
    held = {key.name: getattr(op, key.name) for key in keys(type(op))}
    defaults = {key.name: key.default for key in keys(type(op)) if key.default is not MISSING}
    told = {key: value for key, value in held.items() if key not in defaults or value != defaults[key]}
    return {"op": op.name, **told}


def rope_map(rope: Frequencies) -> dict[str, Any]:
    """The map of a rope, without keys at their default."""
    found: dict[str, Any] = {"frequencies": list(rope.frequencies)}
    if rope.factor != 1.0:
        found["factor"] = rope.factor
    if rope.long is not None:
        found |= {"long": list(rope.long), "original_context": rope.original_context}
    return found


def refuse_unknown_words(metadata: Any) -> None:
    """Raise UnsupportedError for an op or a choice that this version does not know.

    This runs before any check for damage, because a newer writer's other keys are not damage either.
    """
    if not isinstance(metadata, dict):
        return
    for where, item in _op_items(metadata):
        name = item.get("op")
        if not isinstance(name, str):
            continue
        _refuse_unknown_word(f"{where}, op", name, tuple(OPS))
        for key, choices in _CHOICES[name]:
            word = item.get(key)
            if isinstance(word, str):
                _refuse_unknown_word(f"{where}, {name!r}, {key}", word, choices)


def _refuse_unknown_word(where: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        problem = f"{shown(word)} is not known to this version, which knows {', '.join(known)}"
        raise UnsupportedError(f"{where}: {problem}; update rkf")


def _op_items(metadata: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every map of an op in a program that may be malformed elsewhere, with its place."""
    kinds = metadata.get("kinds")
    named = enumerate(kinds if isinstance(kinds, list) else ())
    lists = [("stem", metadata.get("stem")), *((f"kind {n}", kind) for n, kind in named), ("top", metadata.get("top"))]
    for where, ops in lists:
        for at, item in enumerate(ops if isinstance(ops, list) else ()):
            if isinstance(item, dict):
                yield f"program, {where}, op {at}", item


_CHOICES = {
    name: [(key.name, key.metadata["choices"]) for key in keys(op) if kind_of(key) == "choice"]
    for name, op in OPS.items()
}
