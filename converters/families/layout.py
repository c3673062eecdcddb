"""Where the tensors of a program are in a checkpoint: names, parts of fused tensors, stacks, and conversions to undo.

Knows no format and no family. A layout is a function from a tensor's name to its origins, the usual one first. It works
in both directions: converters cut a checkpoint's tensors into those of the program, and exporters put them together
again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from rkf.converters.families.blocks import HEAD
from rkf.converters.families.layout_transforms import Added, Shape, Transform, Values
from rkf.errors import SourceError
from rkf.model.program import Program

_LAYER = re.compile(r"model\.(layers\.\d+\.)(.+)")


@dataclass(frozen=True, slots=True)
class Origin:
    """A tensor of the program in terms of a checkpoint's tensors.

    names: the tensor it comes from; if stacked, the tensors of the experts in order, which become one
    [experts, rows, cols]; if joined, vectors that become one, in order. part: the part of the named tensor, as a numpy
    index of slices with both ends; () is all of it. heads: the first axis is that of so many heads, and part is a part
    of each. steps: changes to apply then.
    """

    names: tuple[str, ...]
    part: tuple[slice, ...] = ()
    steps: tuple[Transform, ...] = ()
    stacked: bool = False
    joined: bool = False
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
        if self.joined:
            return (len(self.names) * cut[0],)
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


def one_added(name: str) -> tuple[Origin, ...]:
    """llama.cpp's converter adds 1 to the weights of norms (Gemma3Model.norm_shift in conversion/gemma.py)."""
    return (Origin((name,), steps=(Added(-1.0),)),) if name.endswith("norm.weight") else as_named(name)


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

    Raises SourceError for a tensor that is missing or has another shape.
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
    return dict(sorted(found.items()))


def surplus(found: Mapping[str, Origin], stored: Mapping[str, Shape], label: str) -> list[str]:
    """The tensors that the program does not read. found: the result of `place`.

    Raises SourceError for a fused one of which it reads a part.
    """
    read: dict[str, int] = {}
    for origin in found.values():
        for part in origin.names:
            share = prod(origin.shape(stored[part])) // len(origin.names)
            read[part] = read.get(part, 0) + share
    for name, values in read.items():
        if values != prod(stored[name]):
            raise SourceError(
                f"{label}: tensor {name}: expected {values} values by the configuration, got {prod(stored[name])}"
            )
    return sorted(stored.keys() - read.keys())


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a checkpoint's tensor. number: its place among the origin's names."""

    tensor: str
    origin: Origin
    number: int


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
            if part.origin.stacked or part.origin.joined:
                values = values.reshape(len(part.origin.names), *_inner(part.origin, values.shape))[part.number]
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
            pieces.setdefault(part, []).append(Part(name, origin, number))
    for name, parts in pieces.items():
        yield Assembly(name, whole_shape([(shapes[part.tensor], part.origin) for part in parts]), tuple(parts))


def _inner(origin: Origin, shape: Shape) -> Shape:
    """The shape of one of the tensors that make a tensor of the program."""
    if origin.joined:
        return (shape[0] // len(origin.names),)
    return shape[1:] if origin.stacked else shape


def whole_shape(parts: Sequence[tuple[Shape, Origin]]) -> Shape:
    """The shape of a tensor made of parts."""
    shape, origin = parts[0]
    inner = _inner(origin, shape)
    for step in reversed(origin.steps):
        inner = step.stored(inner)
    cuts = [origin.part for _, origin in parts]
    ends = tuple(
        max(cut[axis].stop for cut in cuts) if axis < len(origin.part) else size for axis, size in enumerate(inner)
    )
    return (ends[0] * origin.heads, *ends[1:]) if ends else ()
