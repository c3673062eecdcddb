"""A program's ops as the work of a pass: products, micro-ops on one token's row, and work with its own items.

A product includes the gate or the sum that follows it. A rope includes the scale of the attention that it feeds. Pure:
knows no memory and no kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from rkf.model.op import Op
from rkf.model.ops import Add, Attention, Conv, Delta, Experts, Gate, Linear, Logits, Rope, Route, Scan


class Packed(NamedTuple):
    """The packed form of a value."""

    of: Value


class Stream(NamedTuple):
    """A value of the layers as the top sees it: of all tokens, not only of the wanted ones."""

    of: str


class Inside(NamedTuple):
    """A value passed between the parts of one op. of: the value that the op reads or writes; number: its part."""

    what: str
    of: str = ""
    number: int = 0


Value = str | Packed | Stream | Inside
Inputs = Collection[tuple[Value, tuple[str, ...]]]
PARTIALS, CACHE, STATE = Inside("partials"), Inside("cache"), Inside("state")


@dataclass(frozen=True, slots=True)
class Micro:
    """Work on one token's row. what: the op's name, or "take", "pack", "keep", "temper", "join", "mix", ….

    scale: an additional factor in a rope or a scale. outside: it reads or writes something that is not a plain value
    (the cache, a sequence's tables), so only one thread does it.
    """

    what: str
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    op: Op | None = None
    scale: float = 1.0
    outside: bool = False

    @property
    def inputs(self) -> Inputs:
        return ()


@dataclass(frozen=True, slots=True)
class Product:
    """dst = weight times its source, plus bias. logits: the result goes to the call's logits instead of dst.

    sources: of so many equal shares of the rows, each its own. gate: with `partner`, a product of the same source, it
    becomes act(one) * other; added: the sum that it is added to.
    """

    sources: tuple[Value, ...]
    dst: Value
    weight: str
    rows: int
    bias: str | None = None
    partner: Linear | None = None
    gate: Gate | None = None
    added: Add | None = None
    logits: Logits | None = None

    @property
    def kind(self) -> str:
        """The name of its kernel."""
        if self.gate is not None:
            return f"linear:gated:{self.gate.act}"
        if self.logits is not None:
            return "logits"
        return "linear" if self.added is None else "linear:added"

    @property
    def reads(self) -> set[Value]:
        return {*self.sources, *map(Packed, self.sources), *(() if self.added is None else (self.added.a,))}

    @property
    def writes(self) -> set[Value]:
        found: set[Value] = {self.dst}
        if self.partner is not None and self.gate is not None:
            found |= {self.partner.dst, self.gate.dst}
        return found if self.added is None else found | {self.added.dst}

    @property
    def inputs(self) -> Inputs:
        """The values that matrices are multiplied with, with the names of the matrices."""
        weights = (self.weight,) if self.partner is None else (self.weight, self.partner.weight)
        return tuple((source, weights) for source in self.sources)


@dataclass(frozen=True, slots=True)
class Work:
    """A phase with its own items. what: the name of its kernel, without the variant."""

    what: str
    op: Op
    reads: frozenset[Value]
    writes: frozenset[Value]
    inputs: Inputs = ()


Item = Micro | Product | Work


def items(ops: Sequence[Op], lasting: Collection[str], many: bool) -> list[Item]:
    """Ops as work, for a pass of several tokens or of one. lasting: values that live on after the ops."""
    found: list[Item] = []
    done: set[int] = set()
    for at, op in enumerate(ops):
        if at in done:
            continue
        match op:
            case Linear(parts=int()):
                found += _in_parts(op)
            case Linear():
                product, with_it = _fused(op, ops, at, lasting)
                done |= with_it
                found.append(product)
            case Logits():
                found.append(Product((op.src,), op.dst, op.weight, op.rows, op.bias, logits=op))
            case Attention():
                _add_attention(found, op, ops, at, lasting, many)
            case Route():
                scores = Inside("scores", op.dst)
                found.append(Product((op.src,), scores, op.weight, op.experts, op.bias))
                found.append(Micro("route", (scores,), (op.dst,), op))
            case Experts():
                found += _experts(op, many)
            case Conv() | Delta() | Scan():
                found.append(Work(op.name, op, frozenset({*op.reads(), STATE}), frozenset({op.dst, STATE})))
            case _:
                found.append(Micro(op.name, op.reads(), (op.dst,), op, outside=isinstance(op, Rope)))
    return found


# --- products


def _fused(first: Linear, ops: Sequence[Op], at: int, lasting: Collection[str]) -> tuple[Product, set[int]]:
    """The product of the Linear at a place, with the places of the ops fused into it."""
    if at + 2 < len(ops):
        partner, gate = ops[at + 1], ops[at + 2]
        if (
            isinstance(partner, Linear)
            and partner.parts is None
            and isinstance(gate, Gate)
            and (partner.src, partner.rows) == (first.src, first.rows)
            and {gate.a, gate.b} == {first.dst, partner.dst}
            and not gate.by_layer
            and _only_reader(ops, at, at + 2, lasting)
            and _only_reader(ops, at + 1, at + 2, lasting)
        ):
            a, b = (first, partner) if gate.a == first.dst else (partner, first)
            return replace(_product(a), partner=b, gate=gate), {at + 1, at + 2}
    reader = next((n for n in range(at + 1, len(ops)) if first.dst in ops[n].reads()), at)
    add = ops[reader]
    if isinstance(add, Add) and add.b == first.dst and add.a == add.dst not in (first.dst, first.src):
        between = ops[at + 1 : reader]
        untouched = all(add.dst not in (*op.reads(), op.dst) for op in between)
        if untouched and _only_reader(ops, at, reader, lasting):
            return replace(_product(first), added=add), {reader}
    return _product(first), set()


def _product(op: Linear) -> Product:
    return Product((op.src,), op.dst, op.weight, op.rows, op.bias)


def _in_parts(op: Linear) -> list[Item]:
    """Each part of the source gets a row of its own, because a row is packed and padded as a whole."""
    parts = tuple(Inside("part", op.dst, number) for number in range(op.parts or 1))
    cut: list[Item] = [Micro("part", (op.src,), (part,), op) for part in parts]
    return [*cut, Product(parts, op.dst, op.weight, op.rows, op.bias)]


def _only_reader(ops: Sequence[Op], written: int, reader: int, lasting: Collection[str]) -> bool:
    """Whether the value that one op writes is read only by one other op."""
    value = ops[written].dst
    for at in range(written + 1, len(ops)):
        if value in ops[at].reads() and at != reader:
            return False
        if ops[at].dst == value:
            return at >= reader
    return value not in lasting


# --- attention


def _add_attention(
    found: list[Item], op: Attention, ops: Sequence[Op], at: int, lasting: Collection[str], many: bool
) -> None:
    query = _scaled_query(found, op, ops, at, lasting)
    if op.temperature_beta is not None:
        found.append(Micro("temper", (query,), (query,), op))
    if op.k is not None and op.v is not None:
        found.append(Micro("keep", (op.k, op.v), (CACHE,), op, outside=True))
    read = frozenset({query, CACHE})
    if many:
        found.append(Work("attend:many", op, read, frozenset({op.dst})))
    else:
        found.append(Work("attend:one", op, read, frozenset({PARTIALS})))
        found.append(Micro("join", (PARTIALS,), (op.dst,), op))


def _scaled_query(found: list[Item], op: Attention, ops: Sequence[Op], at: int, lasting: Collection[str]) -> Value:
    """Multiply the query by the attention's scale: in the rope that wrote it, if no other op reads it."""
    written = next((n for n in reversed(range(at)) if ops[n].dst == op.q), None)
    alone = written is not None and _only_reader(ops, written, at, lasting)
    for place, item in enumerate(found):
        if alone and isinstance(item, Micro) and item.what == "rope" and item.op is ops[written or 0]:
            found[place] = replace(item, scale=op.scale)
            return op.q
    query: Value = op.q if alone else Inside("scaled", op.q)
    if op.scale != 1 or not alone:
        found.append(Micro("scale", (op.q,), (query,), scale=op.scale))
    return query


# --- mixtures of experts


SLOTS, GATHERED = Inside("slots"), Inside("gathered")
INNER, OUTER = Inside("experts' inner values"), Inside("experts' outputs")


def _experts(op: Experts, many: bool) -> list[Item]:
    """With one token: rows of the chosen experts. With several: tokens are first sorted by expert, so that each
    expert's matrix is read once. Both add up the experts in the order of choice.
    """
    source = (op.src, (op.gate, op.up))
    packed = Packed(op.src)

    def work(what: str, reads: set[Value], writes: set[Value], **rest: Inputs) -> Work:
        return Work(what, op, frozenset(reads), frozenset(writes), **rest)

    if many:
        found: list[Item] = [
            work("sort", {op.route}, {SLOTS}),
            work("gather", {op.src, packed, SLOTS}, {GATHERED}, inputs=(source,)),
            work("experts:many:gate", {SLOTS, GATHERED}, {INNER}),
            work("pack_slots", {SLOTS, INNER}, {INNER}),
            work("experts:many:down", {SLOTS, INNER}, {OUTER}),
        ]
    else:
        found = [
            work("experts:one:gate", {op.src, packed, op.route}, {INNER}, inputs=(source,)),
            Micro("pack_chosen", (INNER,), (Inside("packed inner values"),), op),
            work("experts:one:down", {op.route, Inside("packed inner values")}, {OUTER}),
        ]
    return [*found, Micro("mix", (OUTER, op.route, *((SLOTS,) if many else ())), (op.dst,), op)]
