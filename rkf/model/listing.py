"""A program as text for people: one op per line, in execution order. Reads no tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from itertools import groupby
from typing import Any

from rkf.model.op import Op, keys, kind_of
from rkf.model.program import Program

_MAIN = ("table", "weight")  # keys of the tensor that an op is about


def summary(program: Program) -> str:
    """The size of a program in one line: "30 layers of 1 kind, 18 ops"."""
    ops = sum(map(len, (program.stem, *program.kinds, program.top)))
    return f"{_counted(program.layers, 'layer')} of {_counted(len(program.kinds), 'kind')}, {_counted(ops, 'op')}"


def listing(program: Program) -> Iterator[str]:
    """Every op as `value = op(values, tensors, key=number, …)`; keys at their defaults are left out.

    Layers of one kind are listed once, under the numbers of those layers.
    """
    yield "stem"
    yield from _lines(program.stem)
    for kind, ops in enumerate(program.kinds):
        yield f"layers {_ranges([n for n, each in enumerate(program.order) if each == kind])}"
        yield from _lines(ops)
    yield "top"
    yield from _lines(program.top)
    for number, rope in enumerate(program.ropes):
        turned = f"rope {number}: {_counted(len(rope.frequencies), 'frequency', 'frequencies')}, the first"
        longer = "" if rope.long is None else f", others past {rope.original_context} positions"
        yield f"{turned} {rope.frequencies[0]:g}, the last {rope.frequencies[-1]:g}, factor {rope.factor:g}{longer}"


def _lines(ops: Sequence[Op]) -> Iterator[str]:
    for op in ops:
        plain = [value for key, value in _told(op) if _needs_no_key(key)]
        keyed = [f"{key.name}={_shown(value)}" for key, value in _told(op) if not _needs_no_key(key)]
        yield f"  {op.dst} = {op.name}({', '.join([*plain, *keyed])})"


def _needs_no_key(key: Any) -> bool:
    """Values, and the main tensor of an op: a norm with a bias alone must not read as one with a weight."""
    return kind_of(key) == "value" or (kind_of(key) == "tensor" and key.name in _MAIN)


def _told(op: Op) -> Iterator[tuple[Any, Any]]:
    """The keys that differ from their defaults, with their values, without `dst`."""
    for key in keys(type(op)):
        value = getattr(op, key.name)
        if key.name != "dst" and (key.default is MISSING or value != key.default):
            yield key, value


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _counted(number: int, one: str, more: str | None = None) -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    runs = []
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(runs)
