"""The role of each matrix in its model, found by following values through the ops. Knows programs, not tensors' data.

A role tells how much an error in a matrix costs and how it is best stored. Recipes, budgets and studies use roles, so
they need no family names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rkf.model.op import Op
from rkf.model.ops import (
    Attention,
    Clip,
    Concat,
    Conv,
    Delta,
    Embed,
    Experts,
    Gate,
    Hadamard,
    Linear,
    Logits,
    Norm,
    Rope,
    Route,
    Scale,
    Scan,
)
from rkf.model.program import Program, layer_prefix
from rkf.model.recurrent_ops import Recurrent

ROLES = (
    *("embedding", "head", "query", "key", "value", "output", "gate", "up", "down"),
    *("expert_gate", "expert_up", "expert_down", "router", "kernel", "other"),
)
KEPT_DENSE = ("router", "kernel")
"""Roles of tensors that are never clustered: they are small, and choose or weight everything after them."""

_PASSING = (Norm, Rope, Concat, Scale, Clip, Conv, Hadamard)  # their output keeps the role of their input
# The op that reads a product decides its role. Delta reads queries, keys and values from one matrix. Half of its rows
# are values, whose errors reach the output directly. So do most of Scan's: x.
_BY_READER: Mapping[tuple[type[Op], str], str] = {
    (Attention, "q"): "query",
    (Attention, "k"): "key",
    (Attention, "v"): "value",
    (Delta, "src"): "value",
    (Scan, "src"): "value",
    (Gate, "a"): "gate",
    (Gate, "b"): "up",
}


def roles(program: Program) -> dict[str, str]:
    """The role (one of ROLES) of every tensor that is a matrix, a stack, a router or a kernel, by its full name.

    A tensor that several ops name has the role of its first use: a table that is also the head is an "embedding".
    """
    by_kind = [_of_ops(kind) for kind in program.kinds]
    found = _of_ops(program.stem)
    for number, kind in enumerate(program.order):
        for name, role in by_kind[kind].items():
            found.setdefault(layer_prefix(number) + name, role)
    return {**_of_ops(program.top), **found}


def clusterable(program: Program) -> list[str]:
    """The tensors that a recipe may cluster, by their full names."""
    return [name for name, role in roles(program).items() if role not in KEPT_DENSE]


def shared_inputs(ops: Sequence[Op]) -> dict[str, tuple[str, ...]]:
    """Names of matrices and stacks of one layer (or the stem, or the top) that read the same value.

    The first name of each group -> the group, in the order of the ops, without routers. The gates and ups of experts
    read only the tokens sent to them, not all that a Linear reads, so they are a separate group. So is a Linear in
    parts.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    written: dict[str, int] = {}  # value -> the op that wrote it last
    seen: set[str] = set()

    def add(key: tuple[str, int], *names: str) -> None:
        new = [name for name in names if name not in seen]
        if new:
            groups.setdefault(key, []).extend(new)
            seen.update(new)

    for number, op in enumerate(ops):
        if isinstance(op, Linear) and op.parts is not None:
            add((f"parts of {op.dst}", number), op.weight)
        elif isinstance(op, (Linear, Logits)) and op.rows > 1:
            add((op.src, written.get(op.src, -1)), op.weight)
        elif isinstance(op, Experts):
            add((f"inputs of {op.dst}", number), op.gate, op.up)
            add((f"products of {op.dst}", number), op.down)
        written[op.dst] = number
    return {group[0]: tuple(group) for group in groups.values()}


def _of_ops(ops: Sequence[Op]) -> dict[str, str]:
    """Roles of the tensors of one layer, the stem or the top, by the names that the ops use."""
    found: dict[str, str] = {}
    ends: dict[str, str] = {}  # value -> the role of a Linear that reads it to end a branch
    for number, op in enumerate(ops):
        for name, role in _named(op, ops[number + 1 :], ends):
            found.setdefault(name, role)
        ending = _ending(op, ends)
        if ending is None:
            ends.pop(op.dst, None)
        else:
            ends[op.dst] = ending
    return found


def _named(op: Op, after: Sequence[Op], ends: Mapping[str, str]) -> list[tuple[str, str]]:
    """The matrices of one op, with their roles. after: the ops that follow it."""
    if isinstance(op, Embed):
        return [(op.table, "embedding")]
    if isinstance(op, Logits):
        return [(op.weight, "head")]
    if isinstance(op, Route):
        return [(op.weight, "router")]
    if isinstance(op, Conv):
        return [(op.weight, "kernel")]
    if isinstance(op, Experts):
        return [(op.gate, "expert_gate"), (op.up, "expert_up"), (op.down, "expert_down")]
    if isinstance(op, Linear):
        if op.rows == 1:  # one number that weights a whole branch
            return [(op.weight, "router")]
        return [(op.weight, ends.get(op.src) or _by_reader(op.dst, after))]
    return []


def _ending(op: Op, ends: Mapping[str, str]) -> str | None:
    """The role of a Linear that reads this op's output: "output" after attention and similar ops, "down" after Gate."""
    if isinstance(op, Attention | Recurrent):
        return "output"
    if isinstance(op, Gate):
        return "output" if "output" in (ends.get(op.a), ends.get(op.b or "")) else "down"
    if _passes(op):
        return ends.get(op.reads()[0])
    return None


def _passes(op: Op) -> bool:
    """Whether an op's output keeps the role of its input; a matrix for each head does, too."""
    return isinstance(op, _PASSING) or (isinstance(op, Linear) and op.parts is not None)


def _by_reader(value: str, after: Sequence[Op]) -> str:
    """The role of a product: from the first role-giving op that reads it, directly or through passing ops."""
    holding = {value}
    for op in after:
        reads = holding.intersection(op.reads())
        for (kind, key), role in _BY_READER.items():
            if isinstance(op, kind) and getattr(op, key) in reads:
                return "up" if isinstance(op, Gate) and op.b is None else role
        if reads and _passes(op):
            holding.add(op.dst)
        else:
            holding.discard(op.dst)
    return "other"
