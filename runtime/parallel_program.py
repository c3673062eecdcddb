"""A program split over several processes (tensor parallelism): what each of them computes, and where they exchange.

Every process runs the same ops on its share of the rows or columns of each matrix, with values that are whole or its
own part. Ops that need whole values get them by `Gathered`; sums of partial products by `Summed`. Knows no family, no
weights and no library for communication.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from rkf.errors import UnsupportedError
from rkf.model.op import Op, Width, value_key
from rkf.model.ops import (
    Add,
    Attention,
    Clip,
    Concat,
    Embed,
    Experts,
    Gate,
    Hadamard,
    Linear,
    Logits,
    Norm,
    Rope,
    Scale,
)
from rkf.model.program import Program, layer_prefix
from rkf.runtime.shares import Share

_ALIGNED = 8  # columns: so many end on a whole byte in each plane


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered(Op):
    """dst = the parts of src of all processes, one after the other."""

    name = "gathered"
    src: str = value_key()


@dataclass(frozen=True, slots=True, kw_only=True)
class Summed(Op):
    """dst = the sum of src over all processes."""

    name = "summed"
    src: str = value_key()


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitEmbed(Embed):
    """An Embed of which each process has `rows` rows: zeros for the tokens of other rows."""

    name = "split_embed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitLogits(Logits):
    """A Logits of which each process has `rows` rows; the whole logits are gathered."""

    name = "split_logits"


class SplitProgram(NamedTuple):
    """program: what each process runs; shares: the tensors of which it holds a part, by full name."""

    program: Program
    shares: dict[str, Share]


def split(program: Program, processes: int) -> SplitProgram:
    """The program for each of so many processes. UnsupportedError: a tensor that they cannot divide, by name.

    A matrix whose rows they cannot divide equally is whole in each of them, and so are vectors.
    """
    shares: dict[str, Share] = {}
    lasting = frozenset(op.dst for op in program.stem)
    stem = _OpList(processes, "", shares, {}, lasting)
    new_stem = stem.split(program.stem)
    own_keys: dict[int, bool] = {}
    kinds = {}
    for layer, kind in enumerate(program.order):
        ops = _OpList(processes, layer_prefix(layer), shares, stem.widths, lasting, own_keys, layer)
        kinds[kind] = ops.split(program.kinds[kind])
    new_kinds = tuple(kinds[kind] for kind in range(len(program.kinds)))
    top = _OpList(processes, "", shares, stem.widths, frozenset()).split(program.top)
    return SplitProgram(replace(program, stem=new_stem, kinds=new_kinds, top=top), shares)


class _OpList:
    """The stem, a layer or the top while it is split.

    widths: of whole values at its start. lasting: values that outlive it, which are whole at its end. own_keys: by
    layer, whether each process keeps a part of the key heads.
    """

    def __init__(
        self,
        processes: int,
        prefix: str,
        shares: dict[str, Share],
        widths: Mapping[str, Width],
        lasting: Collection[str],
        own_keys: dict[int, bool] | None = None,
        layer: int = 0,
    ) -> None:
        self._n, self._prefix, self._shares, self._lasting = processes, prefix, shares, lasting
        self._own_keys, self._layer = own_keys if own_keys is not None else {}, layer
        self.widths = dict(widths)
        self._parts: set[str] = set()  # values of which each process has its own part
        self._out: list[Op] = []

    def split(self, ops: Sequence[Op]) -> tuple[Op, ...]:
        for op in ops:
            width = op.width(self.widths)
            is_part = self._add(op)
            self.widths[op.dst] = width
            self._parts.discard(op.dst)
            if is_part:
                self._parts.add(op.dst)
            if op.dst in self._lasting:
                self._whole(op.dst)
        return tuple(self._out)

    def _add(self, op: Op) -> bool:
        """Add the op for one process; whether it writes a part of its value."""
        match op:
            case Embed():
                return self._embed(op)
            case Linear(parts=None):
                return self._linear(op)
            case Linear():
                return self._linear_in_parts(op)
            case Norm():
                return self._in_part(op, (op.src,), None if op.by_group else op.group)
            case Rope():
                return self._in_part(op, (op.src,), op.head_dim)
            case Hadamard():
                return self._in_part(op, (op.src,), op.block)
            case Scale() | Clip():
                return self._in_part(op, (op.src,), 1)
            case Add():
                return self._in_part(op, (op.a, op.b), 1)
            case Gate():
                return self._in_part(op, op.reads(), None if op.by_layer else 1)
            case Concat():
                return self._concat(op)
            case Attention():
                return self._attention(op)
            case Experts():
                return self._experts(op)
            case Logits():
                return self._logits(op)
        return self._in_part(op, op.reads(), None)

    def _whole(self, *values: str) -> None:
        for value in values:
            if value in self._parts:
                self._out.append(Gathered(src=value, dst=value))
                self._parts.remove(value)

    def _in_part(self, op: Op, values: Sequence[str], unit: int | None) -> bool:
        """An op that works on each `unit` numbers alone: on parts, if it reads nothing else and they end between units
        (a single number is the same everywhere); otherwise, or with None, on whole values.
        """
        wide = [value for value in values if self.widths[value] != 1]
        if unit is not None and wide and all(self._ends_between(value, unit) for value in wide):
            self._out.append(op)
            return True
        self._whole(*values)
        self._out.append(op)
        return False

    def _ends_between(self, value: str, unit: int) -> bool:
        width = self.widths[value]
        return value in self._parts and isinstance(width, int) and width // self._n % unit == 0

    def _share(self, axis: int | None, *names: str | None) -> None:
        for name in names:
            if name is not None:
                self._shares[self._prefix + name] = Share(axis, self._n)

    # --- matrices

    def _embed(self, op: Embed) -> bool:
        if op.rows % self._n:
            self._out.append(op)
        else:
            self._share(0, op.table)
            own = {key.name: getattr(op, key.name) for key in fields(op)} | {"rows": op.rows // self._n}
            self._out += [SplitEmbed(**own), Summed(src=op.dst, dst=op.dst)]
        return False

    def _linear(self, op: Linear) -> bool:
        if self._ends_between(op.src, _ALIGNED):  # each process adds up its columns
            self._share(1, op.weight)
            self._share(None, op.bias)
            self._out += [op, Summed(src=op.dst, dst=op.dst)]
            return False
        self._whole(op.src)
        if op.rows % self._n:
            self._out.append(op)
            return False
        self._share(0, op.weight, op.bias)
        self._out.append(replace(op, rows=op.rows // self._n))
        return True

    def _linear_in_parts(self, op: Linear) -> bool:
        parts = op.parts or 1
        if op.src not in self._parts or parts % self._n:
            what = f"one matrix for each of {parts} parts of {op.src!r}"
            raise UnsupportedError(f"{self._prefix}{op.weight}: {what} cannot be divided among {self._n} processes")
        self._share(0, op.weight, op.bias)
        self._out.append(replace(op, parts=parts // self._n, rows=op.rows // self._n))
        return True

    def _experts(self, op: Experts) -> bool:
        self._whole(op.src)
        if op.inner % (_ALIGNED * self._n):
            problem = f"{op.inner} rows of an expert cannot be divided among {self._n} processes"
            raise UnsupportedError(f"{self._prefix}{op.gate}: {problem}")
        self._share(1, op.gate, op.up, op.gate_bias, op.up_bias)
        self._share(2, op.down)
        self._share(None, op.down_bias)
        self._out += [replace(op, inner=op.inner // self._n), Summed(src=op.dst, dst=op.dst)]
        return False

    def _logits(self, op: Logits) -> bool:
        self._whole(op.src)
        if op.rows % self._n:
            self._out.append(op)
        else:
            self._share(0, op.weight, op.bias)
            own = {key.name: getattr(op, key.name) for key in fields(op)} | {"rows": op.rows // self._n}
            self._out.append(SplitLogits(**own))
        return False

    # --- heads

    def _concat(self, op: Concat) -> bool:
        both = op.a in self._parts and op.b in self._parts and op.heads % self._n == 0
        if not both:
            self._whole(op.a, op.b)
        self._out.append(replace(op, heads=op.heads // self._n) if both else op)
        return both

    def _attention(self, op: Attention) -> bool:
        """By heads. A single key head, which all heads read, is whole in each process."""
        keys = [value for value in (op.k, op.v) if value is not None]
        heads = op.q in self._parts and op.heads % self._n == 0
        if op.shares is not None:
            own = self._own_keys[op.shares]
        else:
            own = heads and op.kv_heads % self._n == 0 and all(value in self._parts for value in keys)
            self._own_keys[self._layer] = own
        if not own:
            self._whole(*keys)
        if not own and op.kv_heads > 1:
            heads = False
        if own and not heads:
            problem = f"attention over the key heads of layer {op.shares} cannot be divided as they are"
            raise UnsupportedError(f"{self._prefix}{op}: {problem}")
        if not heads:
            self._whole(op.q)
            self._out.append(op)
            return False
        self._share(0, op.sinks)
        kv_heads = op.kv_heads // self._n if own else op.kv_heads
        self._out.append(replace(op, heads=op.heads // self._n, kv_heads=kv_heads))
        return True
