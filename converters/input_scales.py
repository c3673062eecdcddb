"""Scales for the inputs of rotated matrices, at no cost when the model runs: the tensors before them take the inverse.

Rotation spreads the error of a row over all columns alike, but inputs differ in size. The sum of the outputs' errors is
least if column c is multiplied by sqrt(rms of its input / rms of the column) before rotation and its input divided by
it; the rms of the column makes no difference (docs/log.md). The norm, the values of attention or the other factor of a
gate before the matrix can divide. Knows programs and mean squares, no weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rkf.model.op import Op
from rkf.model.ops import Attention, Embed, Experts, Gate, Hadamard, Linear, Norm
from rkf.model.program import Program, layer_prefix
from rkf.model.rotation import matrix_of

F32 = NDArray[np.float32]

_LEAST = 0.1  # of the mean of all columns is added to each mean square: those of a short text are only estimates


@dataclass(frozen=True, slots=True)
class InputScales:
    """What to do to the tensors of a model, by name.

    columns: f32[cols], factors of the columns of a matrix. rows: f32[rows], divisors of the rows of a matrix or of the
    numbers of a vector. offsets: what a norm adds to the weight in `rows`.
    """

    columns: dict[str, F32] = field(default_factory=dict)
    rows: dict[str, F32] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, program: Program, aliases: Mapping[str, str], squares: Mapping[str, NDArray[np.floating]]
    ) -> InputScales:
        """The scales of a rotated program. squares: the mean squares of the inputs of matrices, before rotation,
        [cols] by the matrices' names; inputs without them keep their scale.
        """
        found = cls()
        tables = {aliases.get(op.table, op.table) for op in program.stem if isinstance(op, Embed)}
        shared = {op.shares for kind in program.kinds for op in kind if isinstance(op, Attention)}
        for layer in range(program.layers):
            found._add_list(layer_prefix(layer), program.layer(layer), squares, layer in shared)
        if aliases.get(program.logits.weight, program.logits.weight) not in tables:
            found._add_list("", program.top, squares, False)
        return found

    def touches(self, name: str) -> bool:
        """Whether a tensor of the model is scaled."""
        return name in self.rows or name in self.columns

    def applied(self, name: str, values: F32, rows: slice) -> F32:
        """Rows of a tensor of the model, `values`, scaled; of a vector, numbers of it."""
        if (divisors := self.rows.get(name)) is not None:
            offset = np.float32(self.offsets.get(name, 0))
            values = (values + offset) / divisors[rows].reshape(-1, *[1] * (values.ndim - 1)) - offset
        return values * self.columns[name] if name in self.columns else values

    def _add_list(
        self, prefix: str, ops: Sequence[Op], squares: Mapping[str, NDArray[np.floating]], is_shared: bool
    ) -> None:
        """The scales of one list of ops. is_shared: other layers read the cache of this one."""
        uses = Counter(name for op in ops for name in op.tensor_names())
        for at, op in enumerate(ops):
            if not isinstance(op, Hadamard) or op.src != op.dst:  # then other ops read the plain value
                continue
            names = [name for each in _readers(ops[at + 1 :], op.dst) for name in _matrices(each)]
            before = _divisors(ops, at, is_shared)
            if before is None or any(uses[name] > 1 for name in (*names, *before.tensors)):
                continue
            if all(prefix + name in squares for name in names):
                self._add(prefix, names, before, squares)

    def _add(
        self, prefix: str, names: Sequence[str], before: _Divisors, squares: Mapping[str, NDArray[np.floating]]
    ) -> None:
        mean = squares[prefix + names[0]]  # all read the same input
        if not mean.any():
            return
        by_row = mean.reshape(before.groups, -1, len(mean) // before.groups // before.copies).mean(axis=1)
        wanted = (by_row + _LEAST * by_row.mean()) ** 0.25
        wanted /= np.exp(np.log(wanted).mean())
        repeated = np.repeat(wanted[:, None], before.copies, axis=1).reshape(-1).astype(np.float32)
        self.columns.update((prefix + name, repeated) for name in names)
        self.rows.update((prefix + name, wanted.reshape(-1).astype(np.float32)) for name in before.tensors)
        self.offsets.update((prefix + name, offset) for name, offset in before.offsets.items())


@dataclass(frozen=True, slots=True)
class _Divisors:
    """The tensors that can divide an input. groups, copies: the input is `groups` heads of values, each `copies` times
    in a row.
    """

    tensors: tuple[str, ...]
    offsets: Mapping[str, float] = field(default_factory=dict)
    groups: int = 1
    copies: int = 1


def _divisors(ops: Sequence[Op], at: int, is_shared: bool) -> _Divisors | None:
    """What can divide the value that op `at` rotates; None if nothing can, or other ops would see it divided too."""
    value = ops[at].dst
    made_at = _writer(ops, at, value)
    if made_at is None or any(value in op.reads() for op in ops[made_at + 1 : at]):
        return None
    op = ops[made_at]
    if isinstance(op, Norm) and op.weight is not None and op.group is None:
        return _Divisors(_given(op.weight, op.bias), {op.weight: op.offset})
    if isinstance(op, Gate) and op.b is not None and op.a != op.b and not (op.by_layer or op.limit or op.shift):
        made = _alone(ops, made_at, op.b)
        return None if made is None or made.rows == 1 else _Divisors(_given(made.weight, made.bias))
    if isinstance(op, Attention) and op.v not in (None, op.k, op.q) and not is_shared:
        made = _alone(ops, made_at, op.v)
        if made is not None:
            return _Divisors(_given(made.weight, made.bias), groups=op.kv_heads, copies=op.heads // op.kv_heads)
    return None


def _writer(ops: Sequence[Op], before: int, value: str) -> int | None:
    """The place of the op that wrote a value last."""
    return next((n for n in reversed(range(before)) if ops[n].dst == value), None)


def _alone(ops: Sequence[Op], reader: int, value: str) -> Linear | None:
    """The product that made a value, if no op but one reads any value of this name."""
    made_at = _writer(ops, reader, value)
    if made_at is None or any(value in op.reads() for n, op in enumerate(ops) if n != reader):
        return None
    op = ops[made_at]
    return op if isinstance(op, Linear) and op.parts is None else None


def _readers(ops: Sequence[Op], value: str) -> Iterable[Op]:
    for op in ops:
        if value in op.reads():
            yield op
        if op.dst == value:
            break


def _matrices(op: Op) -> tuple[str, ...]:
    name = matrix_of(op)
    return () if name is None else (name, op.up) if isinstance(op, Experts) else (name,)


def _given(*names: str | None) -> tuple[str, ...]:
    return tuple(name for name in names if name is not None)
