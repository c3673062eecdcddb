"""Work as the phases of a pass: what can run together, and where threads must wait for each other.

Products whose inputs are ready share a phase, and so do neighbouring micro-ops. Pure: knows no memory and no kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rkf.model.op import Op
from rkf.model.ops import Hadamard
from rkf.runtime.items import Item, Micro, Packed, Product, Stream, Value, Work, items
from rkf.runtime.structs import ROUNDED


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


Phase = TokenPhase | ProductPhase | Work


def phases(ops: Sequence[Op], *, lasting: Collection[str], fast: frozenset[str], many: bool) -> list[Phase]:
    """The phases of some ops in order, for a pass of several tokens or of one.

    lasting: values that live on after them; fast: the matrices, by their names in the ops, that read packed
    activations.
    """
    return _phases(items(ops, lasting, many), lasting, fast, many, rounding=True)


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
    return _phases([*taken, *items(ops, (), many)], (), fast, many, rounding=False)


def _phases(
    work: Sequence[Item], lasting: Collection[str], fast: frozenset[str], many: bool, *, rounding: bool
) -> list[Phase]:
    """rounding: activations that a Hadamard transform has just made alike are packed rounded (kernels/packing.py). The
    head's are not: its errors reach the logits undiminished, and few tokens of a prompt need it.
    """
    found: list[Phase] = []
    packed: set[Value] = set()
    at = 0
    while at < len(work):
        item = work[at]
        run = _together(work[at:]) if isinstance(item, Product) else [item]
        at += len(run)
        for each in run:
            for source in _packs(each, fast) - packed:  # not written by a micro-op, or kept from earlier
                _add_micro(found, Micro("pack", (source,), (Packed(source),)))
                packed.add(source)
        if isinstance(item, Product):
            found.append(ProductPhase([each for each in run if isinstance(each, Product)]))
        elif isinstance(item, Work):
            found.append(item)
        else:
            _add_micro(found, item)
        packed -= {value for each in run for value in each.writes}
        if isinstance(item, Micro):
            turned = item.op if isinstance(item.op, Hadamard) and item.op.block % ROUNDED == 0 else None
            for value in item.writes:
                if _is_packed_later(value, work[at:], fast):
                    _add_micro(found, Micro("pack", (value,), (Packed(value),), turned if rounding else None))
                    packed.add(value)
    if not many:
        _choose_own(found, lasting)
    return found


def _packs(item: Item, fast: frozenset[str]) -> set[Value]:
    """The values that an item needs in packed form."""
    return {source for source, weights in item.inputs if not fast.isdisjoint(weights)}


def _is_packed_later(value: Value, later: Iterable[Item], fast: frozenset[str]) -> bool:
    """Whether a value is needed in packed form before it is overwritten."""
    for item in later:
        if value in _packs(item, fast):
            return True
        if value in item.writes:
            return False
    return False


def _add_micro(found: list[Phase], micro: Micro) -> None:
    if found and isinstance(found[-1], TokenPhase):
        found[-1].micros.append(micro)
    else:
        found.append(TokenPhase([micro]))


def _together(work: Sequence[Item]) -> list[Item]:
    """The products at the start of `work` that form one phase."""
    run: list[Item] = []
    read: set[Value] = set()
    written: set[Value] = set()
    for item in work:
        if not isinstance(item, Product) or (isinstance(work[0], Product) and item.kind != work[0].kind):
            break
        if item.reads & written or item.writes & (read | written):
            break
        run.append(item)
        read |= item.reads
        written |= item.writes
    return run


# --- work that every thread does for itself


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
    its packed form in one place; or to add to it.
    """
    return any(_packs_or_adds(phase, written) for phase in later)


def _packs_or_adds(phase: Phase, written: set[Value]) -> bool:
    """Whether a phase packs one of these values, or adds to it."""
    if isinstance(phase, TokenPhase):
        return any(micro.what == "pack" and micro.reads[0] in written for micro in phase.micros)
    if isinstance(phase, ProductPhase):
        return any(product.added is not None and product.added.a in written for product in phase.products)
    return False
