"""What all ops of a program have in common: their keys, the values they read, the tensors they name, their types.

An op is plain data. `reads` and `dst` are names of values; a value is one vector per token. `weights` gives the tensors
of an op with their shapes, from the widths of the values it reads, and checks that those widths fit. Knows no op.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from rkf.format.fields import refuse, shown

# The role of a tensor in its op. Only the first three are worth clustering; the others are small and stay dense.
EMBEDDING, MATRIX, STACK, ROUTER, KERNEL, VECTOR = "embedding", "matrix", "stack", "router", "kernel", "vector"
# The words of the key act.
ACTIVATIONS = ("identity", "sigmoid", "silu", "gelu", "gelu_tanh", "relu", "relu2", "xielu")


class Weight(NamedTuple):
    """A tensor that an op reads: its name (inside a layer: relative to the layer), its shape, and its role."""

    name: str
    shape: tuple[int, ...]
    role: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """The type of the value that Route writes: `count` of `experts`, with a weight each."""

    experts: int
    count: int


Width = int | Chosen
"""The type of a value: a vector of this many numbers, or the experts that Route chose."""


# --- declaring the fields of an op: the kind determines how a reader checks the key (rkf/model/op_maps.py)


def key_of(kind: str, default: Any = MISSING, **rest: Any) -> Any:
    return field(default=default, metadata={"kind": kind, **rest})


def value_key(default: Any = MISSING) -> Any:
    return key_of("value", default)


def tensor_key(default: Any = MISSING) -> Any:
    return key_of("tensor", default)


def size_key(default: Any = MISSING) -> Any:
    return key_of("size", default)


def number_key(default: Any = MISSING, above: float | None = None) -> Any:
    return key_of("number", default, above=above)


def flag_key() -> Any:
    return key_of("flag", False)


def choice_key(choices: tuple[str, ...], default: Any = MISSING) -> Any:
    return key_of("choice", default, choices=choices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One step of a program. dst: the value it writes."""

    name: ClassVar[str]
    dst: str = value_key()

    def reads(self) -> tuple[str, ...]:
        """The values that the op reads, in the order of its fields."""
        return tuple(value for key, value in self._named("value") if key != "dst")

    def tensor_names(self) -> tuple[str, ...]:
        """The tensors that the op names."""
        return tuple(value for _, value in self._named("tensor"))

    def _named(self, kind: str) -> Iterator[tuple[str, str]]:
        """The keys of this kind that are set, with the names they hold."""
        for key in keys(type(self)):
            value = getattr(self, key.name)
            if kind_of(key) == kind and value is not None:
                yield key.name, value

    def weights(self, widths: Mapping[str, Width]) -> Iterator[Weight]:
        """The tensors that the op reads, given the types of all values at that point."""
        return iter(())

    def width(self, widths: Mapping[str, Width]) -> Width:
        """The type of the value it writes. Raises StructureError if the values that it reads do not fit."""
        raise TypeError(f"{type(self).__name__} has no width")

    def __str__(self) -> str:
        """The op in messages, behind its place in the program."""
        return f"{self.name!r} that writes {shown(self.dst)}"

    def need(self, holds: bool, expected: object, got: object) -> None:
        """Raise StructureError unless `holds`."""
        if not holds:
            refuse(str(self), expected, got)

    def vector(self, widths: Mapping[str, Width], value: str) -> int:
        """The width of a value that must be a vector."""
        width = widths[value]
        if not isinstance(width, int):
            refuse(str(self), f"a vector in {value!r}", "chosen experts")
        return width


def keys(op: type[Op]) -> tuple[Field[Any], ...]:
    """The keys of an op's map, in the order of its class."""
    return fields(op)


def kind_of(key: Field[Any]) -> str:
    """The kind of a key: "value", "tensor", "size", "number", "flag", "choice", "rope" or "layer"."""
    kind: str = key.metadata["kind"]
    return kind


def refuse_xielu(op: Op, act: str) -> None:
    """Refuse the activation that has tensors, in an op that cannot name them."""
    op.need(act != "xielu", "another act: 'xielu' has tensors, which only gate names", repr(act))
