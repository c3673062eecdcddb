"""A program's ops as the phases of a pass: what can run together, and where threads must wait for each other.

Products whose inputs are ready share a phase, together with the gate or the sum that follows them. Work on a single
token's row becomes micro-ops; neighbouring micro-ops share a phase. Pure: knows no memory and no kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rkf.model.ops import Add, Attention, Gate, Linear, Logits, Op, Rope


class Packed(NamedTuple):
    """The packed form of a value."""

    of: str


class Scaled(NamedTuple):
    """A query times its scale, where the unscaled query is also needed."""

    of: str


class Stream(NamedTuple):
    """A value of the layers as the top sees it: of all tokens, not only of the wanted ones."""

    of: str


class Inside(NamedTuple):
    """A value passed only between the phases of one op."""

    what: str


Value = str | Packed | Scaled | Stream | Inside
PARTIALS, CACHE = Inside("partials"), Inside("cache")


@dataclass(frozen=True, slots=True)
class Micro:
    """Work on one token's row. what: the op's name, or "take", "pack", "keep", "temper", "join".

    scale: an additional factor in a rope or a scale. outside: it reads or writes something that is not a plain value
    (the cache, a sequence's tables), so only one thread does it.
    """

    what: str
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    op: Op | None = None
    scale: float = 1.0
    outside: bool = False


@dataclass(frozen=True, slots=True)
class Product:
    """A Linear or the Logits. gate: with the product `partner` it becomes act(this) * partner, or the reverse; added:
    the sum that it is added to.
    """

    op: Linear | Logits
    partner: Linear | None = None
    gate: Gate | None = None
    added: Add | None = None

    @property
    def kind(self) -> str:
        if self.gate is not None:
            return f"linear:gated:{self.gate.act}"
        if isinstance(self.op, Logits):
            return "logits"
        return "linear" if self.added is None else "linear:added"

    @property
    def reads(self) -> set[Value]:
        return {self.op.src, Packed(self.op.src), *(() if self.added is None else (self.added.a,))}

    @property
    def writes(self) -> set[Value]:
        found: set[Value] = {self.op.dst}
        if self.partner is not None and self.gate is not None:
            found |= {self.partner.dst, self.gate.dst}
        return found if self.added is None else found | {self.added.dst}

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of its matrices."""
        return (self.op.weight,) if self.partner is None else (self.op.weight, self.partner.weight)


@dataclass(slots=True)
class TokenPhase:
    """Micro-ops of one token. own: when there is one token, every thread runs them for itself."""

    micros: list[Micro]
    own: bool = False

    @property
    def reads(self) -> set[Value]:
        """The values it reads from earlier phases."""
        found: set[Value] = set()
        written: set[Value] = set()
        for micro in self.micros:
            found |= set(micro.reads) - written
            written |= set(micro.writes)
        return found

    @property
    def writes(self) -> set[Value]:
        return {value for micro in self.micros for value in micro.writes}


@dataclass(slots=True)
class ProductPhase:
    """Products of one kind that do not read each other's outputs."""

    products: list[Product]

    @property
    def kind(self) -> str:
        return self.products[0].kind

    @property
    def reads(self) -> set[Value]:
        return {value for product in self.products for value in product.reads}

    @property
    def writes(self) -> set[Value]:
        return {value for product in self.products for value in product.writes}


@dataclass(slots=True)
class OpPhase:
    """A phase of an op with its own kind of items."""

    what: str
    op: Op
    reads: set[Value] = field(default_factory=set)
    writes: set[Value] = field(default_factory=set)


Phase = TokenPhase | ProductPhase | OpPhase
_Item = Micro | Product | OpPhase


def top_phases(ops: Sequence[Op], *, streams: Collection[str], fast: frozenset[str], many: bool) -> list[Phase]:
    """The phases of the top, for several wanted tokens or for one. streams: the values that live through all layers;
    fast: as in `phases`.
    """
    read: dict[str, None] = {}
    written: set[str] = set()
    for op in ops:
        read |= dict.fromkeys(value for value in op.reads() if value not in written)
        written.add(op.dst)
    taken = [Micro("take", (Stream(value),), (value,)) for value in read if value in streams]
    return _phases(taken + _items(ops, (), many), (), fast, many)


def phases(ops: Sequence[Op], *, lasting: Collection[str], fast: frozenset[str], many: bool) -> list[Phase]:
    """The phases of some ops in order, for a pass of several tokens or of one.

    lasting: values that live on after them; fast: the matrices, by their names in the ops, that read packed
    activations.
    """
    return _phases(_items(ops, lasting, many), lasting, fast, many)


# --- ops to items


def _items(ops: Sequence[Op], lasting: Collection[str], many: bool) -> list[_Item]:
    """Ops as products, micro-ops and separate phases, with combined work fused."""
    found: list[_Item] = []
    done: set[int] = set()
    for at, op in enumerate(ops):
        if at in done:
            continue
        if isinstance(op, Linear):
            product, with_it = _fused(op, ops, at, lasting)
            done |= with_it
            found.append(product)
        elif isinstance(op, Logits):
            found.append(Product(op))
        elif isinstance(op, Attention):
            _add_attention(found, op, ops, at, lasting, many)
        else:
            found.append(Micro(op.name, op.reads(), (op.dst,), op, outside=isinstance(op, Rope)))
    return found


def _fused(first: Linear, ops: Sequence[Op], at: int, lasting: Collection[str]) -> tuple[Product, set[int]]:
    """The product of the Linear at a place, with the places of the ops fused into it."""
    if at + 2 < len(ops):
        partner, gate = ops[at + 1], ops[at + 2]
        if (
            isinstance(partner, Linear)
            and isinstance(gate, Gate)
            and (partner.src, partner.rows) == (first.src, first.rows)
            and {gate.a, gate.b} == {first.dst, partner.dst}
            and not gate.by_layer
            and _only_reader(ops, at, at + 2, lasting)
            and _only_reader(ops, at + 1, at + 2, lasting)
        ):
            pair = (first, partner) if gate.a == first.dst else (partner, first)
            return Product(pair[0], partner=pair[1], gate=gate), {at + 1, at + 2}
    reader = next((n for n in range(at + 1, len(ops)) if first.dst in ops[n].reads()), at)
    add = ops[reader]
    if isinstance(add, Add) and add.b == first.dst and add.a == add.dst not in (first.dst, first.src):
        between = ops[at + 1 : reader]
        untouched = all(add.dst not in (*op.reads(), op.dst) for op in between)
        if untouched and _only_reader(ops, at, reader, lasting):
            return Product(first, added=add), {reader}
    return Product(first), set()


def _only_reader(ops: Sequence[Op], written: int, reader: int, lasting: Collection[str]) -> bool:
    """Whether the value that one op writes is read only by one other op."""
    value = ops[written].dst
    for at in range(written + 1, len(ops)):
        if value in ops[at].reads() and at != reader:
            return False
        if ops[at].dst == value:
            return at >= reader
    return value not in lasting


def _add_attention(
    found: list[_Item], op: Attention, ops: Sequence[Op], at: int, lasting: Collection[str], many: bool
) -> None:
    query = _scaled_query(found, op, ops, at, lasting)
    if op.temperature_beta is not None:
        found.append(Micro("temper", (query,), (query,), op))
    if op.k is not None and op.v is not None:
        found.append(Micro("keep", (op.k, op.v), (CACHE,), op, outside=True))
    if many:
        found.append(OpPhase("attend:many", op, {query, CACHE}, {op.dst}))
    else:
        found.append(OpPhase("attend:one", op, {query, CACHE}, {PARTIALS}))
        found.append(Micro("join", (PARTIALS,), (op.dst,), op))


def _scaled_query(found: list[_Item], op: Attention, ops: Sequence[Op], at: int, lasting: Collection[str]) -> Value:
    """Multiply the query by the attention's scale: in the rope that wrote it, if no other op reads it."""
    written = next((n for n in reversed(range(at)) if ops[n].dst == op.q), None)
    alone = written is not None and _only_reader(ops, written, at, lasting)
    for place, item in enumerate(found):
        if alone and isinstance(item, Micro) and item.what == "rope" and item.op is ops[written or 0]:
            found[place] = replace(item, scale=op.scale)
            return op.q
    query: Value = op.q if alone else Scaled(op.q)
    if op.scale != 1 or not alone:
        found.append(Micro("scale", (op.q,), (query,), scale=op.scale))
    return query


# --- items to phases


def _phases(items: Sequence[_Item], lasting: Collection[str], fast: frozenset[str], many: bool) -> list[Phase]:
    found: list[Phase] = []
    packed: set[str] = set()
    at = 0
    while at < len(items):
        item = items[at]
        if isinstance(item, Product):
            run = _together(items[at:])
            sources = dict.fromkeys(each.op.src for each in run if not fast.isdisjoint(each.weights))
            for source in sources.keys() - packed:
                _add_micro(found, Micro("pack", (source,), (Packed(source),)))
            packed |= sources.keys()
            found.append(ProductPhase(run))
            written = found[-1].writes
            at += len(run)
        else:
            if isinstance(item, Micro):
                _add_micro(found, item)
            else:
                found.append(item)
            written = set(item.writes)
            at += 1
        packed -= {value for value in written if isinstance(value, str)}
    if not many:
        _choose_own(found, lasting)
    return found


def _add_micro(found: list[Phase], micro: Micro) -> None:
    if found and isinstance(found[-1], TokenPhase):
        found[-1].micros.append(micro)
    else:
        found.append(TokenPhase([micro]))


def _together(items: Sequence[_Item]) -> list[Product]:
    """The products at the start of `items` that form one phase."""
    run: list[Product] = []
    read: set[Value] = set()
    written: set[Value] = set()
    for item in items:
        if not isinstance(item, Product) or (run and item.kind != run[0].kind):
            break
        if item.reads & written or item.writes & (read | written):
            break
        run.append(item)
        read |= item.reads
        written |= item.writes
    return run


def _choose_own(found: Sequence[Phase], lasting: Collection[str]) -> None:
    """Mark the phases that every thread can run for itself.

    A late thread may compute from values that have already changed. That does no harm if it finds no item to claim
    where its result is read. So no phase up to the last reader may change the inputs of the result.
    """
    sources: dict[Value, set[Value]] = {}
    for at, phase in enumerate(found):
        if not isinstance(phase, TokenPhase):
            for value in phase.writes:
                sources.pop(value, None)
            continue
        made_of = {origin for value in phase.reads for origin in sources.get(value, {value})}
        last = max((_last_reader(found, at, value) for value in phase.writes), default=at)
        changed = {value for later in found[at + 1 : last + 1] for value in later.writes}
        phase.own = (
            not any(micro.outside for micro in phase.micros)
            and not phase.writes & set(lasting)
            and not made_of & changed
            and not _shared_by(found[at + 1 :], phase.writes)
        )
        for value in phase.writes:
            sources.pop(value, None)
            if phase.own:
                sources[value] = made_of


def _last_reader(found: Sequence[Phase], at: int, value: Value) -> int:
    """The last phase that reads a value before it is overwritten."""
    last = at
    for number in range(at + 1, len(found)):
        if value in found[number].reads:
            last = number
        if value in found[number].writes:
            break
    return last


def _shared_by(later: Iterable[Phase], written: set[Value]) -> bool:
    """Whether a later phase needs the written value in shared memory: to pack it, because products expect a value and
    its packed form in one place, or to add to it.
    """
    for phase in later:
        if isinstance(phase, TokenPhase):
            if any(micro.what == "pack" and micro.reads[0] in written for micro in phase.micros):
                return True
        elif isinstance(phase, ProductPhase):
            if any(product.added is not None and product.added.a in written for product in phase.products):
                return True
    return False
