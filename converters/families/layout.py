"""Where the tensors of a program are in a checkpoint: names, parts of fused tensors, stacks, and conversions to undo.

Knows no format and no family. A layout is a function from a tensor's name to its origins, the usual one first. It works
in both directions: converters cut a checkpoint's tensors into those of the program, and exporters put them together
again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rkf.converters.families.blocks import HEAD
from rkf.errors import SourceError, UnsupportedError
from rkf.model.program import Program

_LAYER = re.compile(r"model\.(layers\.\d+\.)(.+)")
Values = NDArray[Any]
Shape = tuple[int, ...]


class Transform(Protocol):
    """A change of a checkpoint tensor's values. moves: whether it only moves values and changes none.

    shape: the new shape for one of the checkpoint's; stored: the inverse.
    """

    @property
    def moves(self) -> bool: ...
    def apply(self, values: Values) -> Values: ...
    def undo(self, values: Values) -> Values: ...
    def shape(self, stored: Shape) -> Shape: ...
    def stored(self, shape: Shape) -> Shape: ...


class SameShape:
    """A transform that keeps the shape."""

    __slots__ = ()

    def shape(self, stored: Shape) -> Shape:
        return stored

    def stored(self, shape: Shape) -> Shape:
        return shape


@dataclass(frozen=True, slots=True)
class Unpermuted(SameShape):
    """Rows of each head, from rope's neighbour pairs (2i, 2i + 1) to the halves (i, i + n) that ops use.

    Source: this is the inverse of `LlamaModel.permute` in llama.cpp's conversion/llama.py. It also applies to biases.
    """

    heads: int
    moves = True

    def apply(self, values: Values) -> Values:
        rows = len(values)
        return values[np.arange(rows).reshape(self.heads, rows // self.heads // 2, 2).swapaxes(1, 2).reshape(-1)]

    def undo(self, values: Values) -> Values:
        rows = len(values)
        return values[np.arange(rows).reshape(self.heads, 2, rows // self.heads // 2).swapaxes(1, 2).reshape(-1)]


@dataclass(frozen=True, slots=True)
class Added(SameShape):
    """A constant is added to every value, f32."""

    constant: float
    moves = False

    def apply(self, values: Values) -> Values:
        return values + np.float32(self.constant)

    def undo(self, values: Values) -> Values:
        return values - np.float32(self.constant)


@dataclass(frozen=True, slots=True)
class Regrouped(SameShape):
    """Heads along an axis, from the order (copy, group) to (group, copy). start: the numbers before the heads stay."""

    groups: int
    copies: int
    axis: int = 0
    start: int = 0
    moves = True

    def apply(self, values: Values) -> Values:
        return self._swapped(values, self.copies, self.groups)

    def undo(self, values: Values) -> Values:
        return self._swapped(values, self.groups, self.copies)

    def _swapped(self, values: Values, outer: int, inner: int) -> Values:
        size = values.shape[self.axis]
        heads = np.arange(self.start, size).reshape(outer, inner, -1).swapaxes(0, 1).reshape(-1)
        return values.take(np.concatenate([np.arange(self.start), heads]), self.axis)


@dataclass(frozen=True, slots=True)
class MinusExp(SameShape):
    """A value is stored as minus its exponential, f32."""

    moves = False

    def apply(self, values: Values) -> Values:
        return np.log(-values.astype(np.float64)).astype(np.float32)

    def undo(self, values: Values) -> Values:
        return -np.exp(values.astype(np.float64)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Transposed:
    """The last two axes are exchanged."""

    moves = True

    def apply(self, values: Values) -> Values:
        return values.swapaxes(-1, -2)

    undo = apply

    def shape(self, stored: Shape) -> Shape:
        return (*stored[:-2], stored[-1], stored[-2])

    stored = shape


@dataclass(frozen=True, slots=True)
class ByHead:
    """Rows of all heads, one below the other, become a matrix for each head."""

    heads: int
    moves = True

    def apply(self, values: Values) -> Values:
        return values.reshape(self.shape(values.shape))

    def undo(self, values: Values) -> Values:
        return values.reshape(self.stored(values.shape))

    def shape(self, stored: Shape) -> Shape:
        return (self.heads, stored[0] // self.heads, *stored[1:])

    def stored(self, shape: Shape) -> Shape:
        return (shape[0] * shape[1], *shape[2:])


@dataclass(frozen=True, slots=True)
class Squeezed:
    """An axis of size 1 is left out, if there is one."""

    axis: int
    moves = True

    def apply(self, values: Values) -> Values:
        return values.squeeze(self.axis) if values.shape[self.axis] == 1 else values

    def undo(self, values: Values) -> Values:
        return np.expand_dims(values, self.axis)

    def shape(self, stored: Shape) -> Shape:
        return (*stored[: self.axis], *stored[self.axis + 1 :]) if stored[self.axis : self.axis + 1] == (1,) else stored

    def stored(self, shape: Shape) -> Shape:
        return (*shape[: self.axis], 1, *shape[self.axis :])


@dataclass(frozen=True, slots=True)
class Scalar:
    """One number, stored without a dimension. Sources read it as [1]."""

    moves = True

    def apply(self, values: Values) -> Values:
        return values

    def undo(self, values: Values) -> Values:
        return values.reshape(())

    def shape(self, stored: Shape) -> Shape:
        return stored

    def stored(self, shape: Shape) -> Shape:
        return ()


@dataclass(frozen=True, slots=True)
class Flattened:
    """The first axis, of this many rows, and the second one become one."""

    rows: int
    moves = True

    def apply(self, values: Values) -> Values:
        return values.reshape(-1)

    def undo(self, values: Values) -> Values:
        return values.reshape(self.rows, -1)

    def shape(self, stored: Shape) -> Shape:
        return (prod(stored),) if len(stored) == 2 and stored[0] == self.rows else stored

    def stored(self, shape: Shape) -> Shape:
        return self.rows, shape[0] // self.rows


@dataclass(frozen=True, slots=True)
class Origin:
    """A tensor of the program in terms of a checkpoint's tensors.

    names: the tensor it comes from; if stacked, the tensors of the experts in order, which become one
    [experts, rows, cols]. part: the part of the named tensor, as a numpy index of slices with both ends; () is all of
    it. heads: the first axis is that of so many heads, and part is a part of each. steps: changes to apply then.
    """

    names: tuple[str, ...]
    part: tuple[slice, ...] = ()
    steps: tuple[Transform, ...] = ()
    stacked: bool = False
    heads: int = 1

    def renamed(self, rename: Callable[[str], str]) -> Origin:
        return replace(self, names=tuple(map(rename, self.names)))

    def shape(self, stored: Shape) -> Shape:
        """The shape of the program's tensor, from the shape of the checkpoint's."""
        first = stored[0] // self.heads if stored[0] % self.heads == 0 else 0
        cut = tuple(
            len(range(*self.part[axis].indices(size))) if axis < len(self.part) else size
            for axis, size in enumerate((first, *stored[1:]))
        )
        cut = (cut[0] * self.heads, *cut[1:])
        for step in self.steps:
            cut = step.shape(cut)
        return (len(self.names), *cut) if self.stacked else cut

    def cut(self, values: Values) -> Values:
        """The part of a whole checkpoint's tensor, before the steps."""
        if self.heads == 1:
            return values[self.part]
        each = values.reshape(self.heads, -1, *values.shape[1:])[(slice(None), *self.part)]
        return each.reshape(-1, *each.shape[2:])

    def put(self, part: Values, whole: Values) -> None:
        """Write the part into a checkpoint's tensor; the inverse of `cut`."""
        if self.heads == 1:
            whole[self.part] = part
            return
        each = whole.reshape(self.heads, -1, *whole.shape[1:])
        each[(slice(None), *self.part)] = part.reshape(self.heads, -1, *part.shape[1:])

    @property
    def keeps_values(self) -> bool:
        """Whether values only move and so keep their dtype."""
        return all(step.moves for step in self.steps)


Layout = Callable[[str], tuple[Origin, ...]]


def as_named(name: str) -> tuple[Origin, ...]:
    """The layout of a checkpoint with the program's own names and shapes."""
    return (Origin((name,)),)


def fused_rows(fusions: Mapping[str, Mapping[str, int]]) -> Layout:
    """The layout of a checkpoint with fused modules. fusions: fused module -> its parts in order, and their rows."""
    found: dict[str, tuple[str, slice]] = {}
    for fused, parts in fusions.items():
        start = 0
        for part, rows in parts.items():
            found[part] = fused, slice(start, start + rows)
            start += rows

    def layout(name: str) -> tuple[Origin, ...]:
        module, _, last = name.rpartition(".")
        if module not in found:
            return as_named(name)
        fused, rows = found[module]
        return (Origin((f"{fused}.{last}",), (rows,)),)

    return layout


def renamed(names: Mapping[str, str]) -> Layout:
    """The layout of a checkpoint with other names for some modules. names: ours -> the checkpoint's."""

    def layout(name: str) -> tuple[Origin, ...]:
        module, _, last = name.rpartition(".")
        return as_named(f"{names.get(module, module)}.{last}")

    return layout


def by_full_name(layout: Layout, prefix: str = "model.") -> Layout:
    """A family's layout over names inside a layer, as a layout over full names. prefix: what is before "layers."."""

    def origins(name: str) -> tuple[Origin, ...]:
        match = _LAYER.fullmatch(name)
        if match is None:
            return layout(name)
        return tuple(origin.renamed(lambda inner: prefix + match[1] + inner) for origin in layout(match[2]))

    return origins


def place(program: Program, layout: Layout, stored: Mapping[str, Shape], tied: bool, label: str) -> dict[str, Origin]:
    """The origin of each tensor of the program, in name order. stored: name -> shape of the checkpoint's tensors.

    Raises SourceError for a tensor that is missing or has another shape, UnsupportedError for one that no op reads.
    """
    found: dict[str, Origin] = {}
    for name, shape, _ in program.weights():  # lazily: with a forged number of layers, the first missing one ends it
        if tied and name == HEAD:
            continue
        possible = layout(name)
        origin = next((each for each in possible if all(part in stored for part in each.names)), None)
        if origin is None:
            missing = next(part for part in possible[0].names if part not in stored)
            wanted = f"for {name} {list(shape)}" if missing != name else f"{list(shape)}"
            raise SourceError(f"{label}: tensor {missing} is missing, expected {wanted}; is a shard absent?")
        for part in origin.names:
            got = origin.shape(stored[part])
            if stored[part] != stored[origin.names[0]] or got != shape:
                raise SourceError(
                    f"{label}: tensor {part}: expected shape {list(shape)} of {name} by the configuration, "
                    f"got {list(got)}"
                )
        found[name] = origin
    _refuse_surplus(found, stored, label)
    return dict(sorted(found.items()))


def _refuse_surplus(found: Mapping[str, Origin], stored: Mapping[str, Shape], label: str) -> None:
    """Refuse tensors, and parts of fused ones, that the program does not read."""
    read: dict[str, int] = {}
    for origin in found.values():
        for part in origin.names:
            share = prod(origin.shape(stored[part])) // (len(origin.names) if origin.stacked else 1)
            read[part] = read.get(part, 0) + share
    for name in sorted(stored):
        if name not in read:
            raise UnsupportedError(f"{label}: tensor {name} is not part of the model that the configuration describes")
        if read[name] != prod(stored[name]):
            raise SourceError(
                f"{label}: tensor {name}: expected {read[name]} values by the configuration, got {prod(stored[name])}"
            )


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a checkpoint's tensor. expert: its number in a stack, None for a tensor that is not a stack."""

    tensor: str
    origin: Origin
    expert: int | None


@dataclass(frozen=True, slots=True)
class Assembly:
    """A tensor of a checkpoint to be written, and its pieces."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]

    def values(self, decode: Callable[[str], Values]) -> Values:
        """f32[shape]. decode: returns a tensor of the program, f32."""
        out = np.empty(self.shape, np.float32)
        for part in self.parts:
            values = decode(part.tensor)
            values = values if part.expert is None else values[part.expert]
            for step in reversed(part.origin.steps):
                values = step.undo(values)
            part.origin.put(values, out)
        return out


def assemblies(layout: Layout, shapes: Mapping[str, Shape]) -> Iterator[Assembly]:
    """The tensors of a checkpoint with this layout, each stack in order. shapes: those of the program's tensors."""
    pieces: dict[str, list[Part]] = {}
    for name in shapes:
        origin = layout(name)[0]
        for number, part in enumerate(origin.names):
            pieces.setdefault(part, []).append(Part(name, origin, number if origin.stacked else None))
    for name, parts in pieces.items():
        yield Assembly(name, _whole([(shapes[part.tensor], part.origin) for part in parts]), tuple(parts))


def _whole(parts: list[tuple[Shape, Origin]]) -> Shape:
    """The shape of a tensor made of parts."""
    shape, origin = parts[0]
    inner = shape[1:] if origin.stacked else shape
    for step in reversed(origin.steps):
        inner = step.stored(inner)
    cuts = [origin.part for _, origin in parts]
    ends = tuple(
        max(cut[axis].stop for cut in cuts) if axis < len(origin.part) else size for axis, size in enumerate(inner)
    )
    return (ends[0] * origin.heads, *ends[1:]) if ends else ()
