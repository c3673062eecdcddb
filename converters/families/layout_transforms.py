"""Conversions of a checkpoint tensor's values to those that a program reads, each with its inverse. Knows no family."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

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
