"""Where the tensors of a program lie in a checkpoint: names, parts of fused ones, stacks, and what is undone.

Knows no format and no family. A layout is a function from a tensor's name to its origins, the usual one first. What it
says is read in both directions: converters cut a checkpoint's tensors to those of the program, exporters put them
together again.
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

_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
Values = NDArray[Any]
Shape = tuple[int, ...]


class Step(Protocol):
    """What is done with the values of a checkpoint's tensor. moves: it changes none of them, only where they are."""

    @property
    def moves(self) -> bool: ...
    def apply(self, values: Values) -> Values: ...
    def undo(self, values: Values) -> Values: ...


@dataclass(frozen=True, slots=True)
class Unpermuted:
    """Rows of each head from rope's neighbour pairs (2i, 2i + 1) to halves (i, i + n), as ops have them.

    Source: `LlamaModel.permute` of llama.cpp's conversion/llama.py, whose inverse this is; biases too.
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
class Added:
    """A constant is added to every value, f32."""

    constant: float
    moves = False

    def apply(self, values: Values) -> Values:
        return values + np.float32(self.constant)

    def undo(self, values: Values) -> Values:
        return values - np.float32(self.constant)


@dataclass(frozen=True, slots=True)
class Origin:
    """A tensor of the program, in terms of a checkpoint's.

    names: the tensor that it is, or, where stacked, the tensors of the experts in order, which become one
    [experts, rows, cols]. part: what it is of the named tensor, as a numpy index of slices with both ends; () is all of
    it. steps: what is done then.
    """

    names: tuple[str, ...]
    part: tuple[slice, ...] = ()
    steps: tuple[Step, ...] = ()
    stacked: bool = False

    def renamed(self, rename: Callable[[str], str]) -> Origin:
        return replace(self, names=tuple(map(rename, self.names)))

    def shape(self, stored: Shape) -> Shape:
        """The shape of the program's tensor, given that of the checkpoint's."""
        cut = tuple(
            len(range(*self.part[axis].indices(size))) if axis < len(self.part) else size
            for axis, size in enumerate(stored)
        )
        return (len(self.names), *cut) if self.stacked else cut

    @property
    def keeps_values(self) -> bool:
        """Whether values only move, so that they keep their dtype."""
        return all(step.moves for step in self.steps)


Layout = Callable[[str], tuple[Origin, ...]]


def as_named(name: str) -> tuple[Origin, ...]:
    """The layout of a checkpoint that has the program's own names and shapes."""
    return (Origin((name,)),)


def by_full_name(layout: Layout) -> Layout:
    """A family's layout, which knows names inside a layer, as one over full names."""

    def origins(name: str) -> tuple[Origin, ...]:
        match = _LAYER.fullmatch(name)
        if match is None:
            return layout(name)
        return tuple(origin.renamed(lambda inner: match[1] + inner) for origin in layout(match[2]))

    return origins


def place(program: Program, layout: Layout, stored: Mapping[str, Shape], tied: bool, label: str) -> dict[str, Origin]:
    """Where each tensor of the program is, in name order. stored: name -> shape of what the checkpoint has.

    Raises SourceError for a tensor that is missing or of another shape, UnsupportedError for one that no op reads.
    """
    found: dict[str, Origin] = {}
    for name, shape, _ in program.weights():  # lazily: a forged number of layers ends at the first that is missing
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
            raise UnsupportedError(f"{label}: tensor {name} has no place in the model that the configuration describes")
        if read[name] != prod(stored[name]):
            raise SourceError(
                f"{label}: tensor {name}: expected {read[name]} values by the configuration, got {prod(stored[name])}"
            )


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a checkpoint's tensor. expert: which of a stack it is, None for a tensor that is no stack."""

    tensor: str
    origin: Origin
    expert: int | None


@dataclass(frozen=True, slots=True)
class Assembly:
    """A tensor of a checkpoint to be written, and the pieces that it is made of."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]

    def values(self, decode: Callable[[str], Values]) -> Values:
        """f32[shape]. decode: gives a tensor of the program, f32."""
        out = np.empty(self.shape, np.float32)
        for part in self.parts:
            values = decode(part.tensor)
            for step in reversed(part.origin.steps):
                values = step.undo(values)
            out[part.origin.part or ...] = values if part.expert is None else values[part.expert]
        return out


def assemblies(layout: Layout, shapes: Mapping[str, Shape]) -> Iterator[Assembly]:
    """The tensors of a checkpoint with this layout, stacks in turn. shapes: of the program's tensors to be written."""
    pieces: dict[str, list[Part]] = {}
    for name in shapes:
        origin = layout(name)[0]
        for number, part in enumerate(origin.names):
            pieces.setdefault(part, []).append(Part(name, origin, number if origin.stacked else None))
    for name, parts in pieces.items():
        yield Assembly(name, _whole([(shapes[part.tensor], part.origin) for part in parts]), tuple(parts))


def _whole(parts: list[tuple[Shape, Origin]]) -> Shape:
    """The shape of a tensor that parts make up."""
    shape, origin = parts[0]
    inner = shape[1:] if origin.stacked else shape
    cuts = [origin.part for _, origin in parts]
    return tuple(
        max(cut[axis].stop for cut in cuts) if axis < len(origin.part) else size for axis, size in enumerate(inner)
    )
