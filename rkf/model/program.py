"""A program: a model's forward pass as data (spec/program.md). Read from metadata, and checked whole.

    stem (token id to values) -> for each layer the ops of its kind -> top (values to logits)

Values that the stem writes live through all layers; a layer may write them again. Whatever else a layer writes ends
with it. Names of tensors inside a layer are relative: `model.layers.N.` goes before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from rkf.errors import UnsupportedError
from rkf.format.fields import Fields, integer, refuse, shown
from rkf.model.ops import (
    OPS,
    Attention,
    Conv,
    Delta,
    Embed,
    Gate,
    Logits,
    Op,
    Rope,
    Weight,
    Width,
    keys,
    kind_of,
)

MAX_OPS = 4096  # of the stem, all kinds and the top together
MAX_LAYERS = 4096
MAX_ROPES = 256
MAX_FREQUENCIES = 4096
_MAX_SIZE = (1 << 31) - 1
_UPDATE = "update rkf"


@dataclass(frozen=True, slots=True)
class Frequencies:
    """How rope turns: radians a position of each pair, and the factor of cosines and sines (attention scaling).

    long: the frequencies of a sequence that may grow past `original_context` positions.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    long: tuple[float, ...] | None = None
    original_context: int | None = None

    def of(self, positions: int) -> tuple[float, ...]:
        """The frequencies of a sequence that may grow to so many positions."""
        if self.long is None or self.original_context is None or positions <= self.original_context:
            return self.frequencies
        return self.long


@dataclass(frozen=True, slots=True)
class Program:
    """kinds: the distinct layers; order: the kind of each layer, the first one first."""

    stem: tuple[Op, ...]
    kinds: tuple[tuple[Op, ...], ...]
    order: tuple[int, ...]
    top: tuple[Op, ...]
    ropes: tuple[Frequencies, ...] = ()

    @property
    def layers(self) -> int:
        return len(self.order)

    def layer(self, number: int) -> tuple[Op, ...]:
        """The ops of a layer."""
        return self.kinds[self.order[number]]

    def cache_of(self, number: int) -> Attention | None:
        """The op that writes a layer's keys and values, if it has one."""
        found = (op for op in self.layer(number) if isinstance(op, Attention) and op.shares is None)
        return next(found, None)

    @property
    def logits(self) -> Logits:
        """The op that ends the program."""
        last = self.top[-1]
        if not isinstance(last, Logits):
            refuse("program, top", "logits as its last op", last.name)
        return last

    @property
    def vocab_size(self) -> int:
        return self.logits.rows

    def weights(self) -> Iterator[Weight]:
        """Every tensor by its full name, in the order of first use, each once.

        Lazily: a forged number of layers ends at the first tensor that is missing.
        """
        seen: dict[str, tuple[int, ...]] = {}
        for prefix, op, widths in self._walk():
            for weight in op.weights(widths):
                full = weight._replace(name=prefix + weight.name)
                if full.name not in seen:
                    seen[full.name] = full.shape
                    yield full
                elif seen[full.name] != full.shape:
                    refuse(f"program, tensor {full.name!r}", f"one shape, {list(seen[full.name])}", list(full.shape))

    def widths(self) -> dict[str, Width]:
        """The type of each value; one that has several (by layer) has its widest here."""
        found: dict[str, Width] = {}
        for _, op, widths in self._walk(each_layer=False):
            written, before = op.width(widths), found.get(op.dst)
            if not (isinstance(before, int) and isinstance(written, int) and before >= written):
                found[op.dst] = written
        return found

    def to_metadata(self) -> dict[str, Any]:
        """The map of `metadata.model.program`; `from_metadata` is the inverse."""
        return {
            "kinds": [[_op_map(op) for op in kind] for kind in self.kinds],
            "order": list(self.order),
            "ropes": [_rope_map(rope) for rope in self.ropes],
            "stem": [_op_map(op) for op in self.stem],
            "top": [_op_map(op) for op in self.top],
        }

    @classmethod
    def from_metadata(cls, metadata: Any) -> Program:
        """The program of a map, all of it checked but for the tensors.

        Raises UnsupportedError for an op, an activation or another word that this version does not know,
        StructureError for everything else that is wrong.
        """
        where = "program"
        _refuse_unknown_words(metadata)
        top = Fields(metadata, where, ("kinds", "order", "ropes", "stem", "top"))
        ropes = tuple(_rope(each, f"{where}, rope {n}") for n, each in enumerate(top.list("ropes", MAX_ROPES)))
        room = _Room(len(ropes))
        kinds = top.list("kinds", MAX_OPS)
        program = cls(
            stem=room.ops(top.raw("stem"), "stem"),
            kinds=tuple(room.ops(kind, f"kind {n}") for n, kind in enumerate(kinds)),
            order=tuple(
                integer(kind, top.at("order"), 0, max(len(kinds) - 1, 0)) for kind in top.list("order", MAX_LAYERS)
            ),
            top=room.ops(top.raw("top"), "top"),
            ropes=ropes,
        )
        program.check()
        return program

    def check(self) -> None:
        """Raise StructureError for a program that cannot be run.

        Every value is written before it is read, read after it is written, and of a width that fits; layers share only
        what earlier ones hold; logits are the end.
        """
        if set(self.order) != set(range(len(self.kinds))):
            refuse("program, order", "every kind at least once", f"{len(set(self.order))} of {len(self.kinds)}")
        for where, ops in (("stem", self.stem), *((f"kind {n}", kind) for n, kind in enumerate(self.kinds))):
            if any(isinstance(op, Logits) for op in ops):
                refuse(f"program, {where}", "no logits before the top", "logits")
        for where, ops in (("stem", self.stem), ("top", self.top)):
            if any(isinstance(op, (Attention, Conv, Delta)) or (isinstance(op, Gate) and op.by_layer) for op in ops):
                refuse(f"program, {where}", "no op that belongs to a layer", "one")
        if not self.top or not isinstance(self.top[-1], Logits):
            refuse("program, top", "logits as its last op", self.top[-1].name if self.top else "nothing")
        if sum(isinstance(op, Logits) for op in self.top) > 1:
            refuse("program, top", "logits once", "twice")
        for _, op, widths in self._walk(each_layer=False):
            op.width(widths)
            if isinstance(op, Embed) and op.rows < self.vocab_size:
                op.need(False, f"at least {self.vocab_size} rows, one a token of the logits", op.rows)
            if isinstance(op, Rope):
                turned = 2 * len(self.ropes[op.table].frequencies)
                op.need(turned <= op.head_dim, f"at most {op.head_dim} numbers turned", turned)
        self._check_uses()
        self._check_caches()

    def _walk(self, each_layer: bool = True) -> Iterator[tuple[str, Op, Mapping[str, Width]]]:
        """Every op in order with the prefix of its tensors and the types of the values before it; without `each_layer`
        every kind once.
        """
        held: dict[str, Width] = {}
        for op in self.stem:
            _known(op, held, "stem")
            yield "", op, held
            held[op.dst] = op.width(held)
        numbers = range(self.layers) if each_layer else [self.order.index(kind) for kind in range(len(self.kinds))]
        for number in numbers:
            inside = dict(held)
            where = f"kind {self.order[number]}"
            for op in self.layer(number):
                _known(op, inside, where)
                if isinstance(op, Gate) and op.by_layer and op.b is not None:
                    wanted = self.layers * op.vector(inside, op.a)
                    op.need(inside[op.b] == wanted, f"{wanted} numbers in {op.b!r}", inside[op.b])
                yield layer_prefix(number), op, inside
                written = op.width(inside)
                if held.get(op.dst, written) != written:
                    op.need(False, f"{held[op.dst]} numbers, as the stem writes", written)
                inside[op.dst] = written
        inside = dict(held)
        for op in self.top:
            _known(op, inside, "top")
            yield "", op, inside
            inside[op.dst] = op.width(inside)

    def _check_uses(self) -> None:
        """What is written is read: within its layer, or if it lives through all layers, somewhere."""
        lasting = {op.dst for op in self.stem}
        everywhere = {value for ops in (self.stem, *self.kinds, self.top) for op in ops for value in op.reads()}
        _used(self.stem, "stem", keep=everywhere)
        for number, kind in enumerate(self.kinds):
            _used(kind, f"kind {number}", keep=lasting & everywhere)
        _used(self.top, "top", keep={self.top[-1].dst})

    def _check_caches(self) -> None:
        """At most one cache and one state of each sort a layer; what is shared is an earlier layer's, of one shape."""
        for number, kind in enumerate(self.kinds):
            for sort in (Attention, Conv, Delta):
                if sum(isinstance(op, sort) and getattr(op, "shares", None) is None for op in kind) > 1:
                    refuse(f"program, kind {number}", f"one {sort.name} that keeps something", "more")
        for number in range(self.layers):
            for op in self.layer(number):
                if isinstance(op, Attention) and op.shares is not None:
                    op.need(op.shares < number, f"the cache of a layer before {number}", op.shares)
                    own = self.cache_of(op.shares)
                    if own is None:
                        op.need(False, f"a layer {op.shares} that has a cache", "none")
                    else:
                        shape = own.kv_heads, own.head_dim, own.value_dim
                        got = op.kv_heads, op.head_dim, op.value_dim
                        op.need(got == shape, f"kv_heads, head_dim, value_dim of layer {op.shares}: {shape}", got)


def layer_prefix(number: int) -> str:
    """What goes before the names of a layer's tensors."""
    return f"model.layers.{number}."


def _known(op: Op, held: Mapping[str, Width], where: str) -> None:
    for value in op.reads():
        if value not in held:
            refuse(f"program, {where}, op {op.name!r}", "values that are written before", f"{value!r}")


def _used(ops: Sequence[Op], where: str, keep: set[str]) -> None:
    """Refuse a value that nobody reads before it is written again or, unless it is in `keep`, before the end."""
    waiting: set[str] = set()
    for op in ops:
        waiting -= set(op.reads())
        if op.dst in waiting:
            refuse(f"program, {where}", f"{op.dst!r} to be read before it is written again", "no op that reads it")
        waiting.add(op.dst)
    unread = sorted(waiting - keep)
    if unread:
        refuse(f"program, {where}", f"an op that reads {unread[0]!r}", "none")


# --- maps to ops and back


class _Room:
    """Reads lists of ops, all together no more than a program may have."""

    def __init__(self, ropes: int) -> None:
        self._left, self._ropes = MAX_OPS, ropes

    def ops(self, items: Any, where: str) -> tuple[Op, ...]:
        where = f"program, {where}"
        if not isinstance(items, list) or len(items) > self._left:
            refuse(where, f"a list of ops, at most {MAX_OPS} in the whole program", shown(items))
        self._left -= len(items)
        return tuple(self._op(item, f"{where}, op {number}") for number, item in enumerate(items))

    def _op(self, item: Any, where: str) -> Op:
        kind = OPS[Fields(item, where, ("op",), None).choice("op", tuple(OPS))]
        required = [key.name for key in keys(kind) if key.default is MISSING]
        optional = [key.name for key in keys(kind) if key.default is not MISSING]
        found = Fields(item, where, ("op", *required), optional)
        return kind(**{key.name: self._read(found, key) for key in keys(kind) if key.name in found})

    def _read(self, found: Fields, key: Any) -> Any:
        return {
            "value": lambda: found.text(key.name),
            "tensor": lambda: found.text(key.name),
            "size": lambda: found.integer(key.name, 1, _MAX_SIZE),
            "number": lambda: _number(found, key.name, key.metadata["above"]),
            "flag": lambda: found.flag(key.name),
            "choice": lambda: found.choice(key.name, key.metadata["choices"]),
            "rope": lambda: found.integer(key.name, 0, self._ropes - 1),
            "layer": lambda: found.integer(key.name, 0, MAX_LAYERS - 1),
        }[kind_of(key)]()


def _number(found: Fields, key: str, above: float | None) -> float:
    value = found.number(key)
    if above is not None and value <= above:
        refuse(found.at(key), f"a number above {above:g}", value)
    return value


def _rope(item: Any, where: str) -> Frequencies:
    found = Fields(item, where, ("frequencies",), ("factor", "long", "original_context"))
    frequencies = _frequencies(found, "frequencies")
    long = _frequencies(found, "long") if "long" in found else None
    if (long is None) != ("original_context" not in found):
        refuse(where, "long and original_context, or neither", "one")
    if long is not None and len(long) != len(frequencies):
        refuse(found.at("long"), f"{len(frequencies)} frequencies", len(long))
    return Frequencies(
        frequencies,
        _number(found, "factor", 0) if "factor" in found else 1.0,
        long,
        found.integer("original_context", 1, _MAX_SIZE) if long is not None else None,
    )


def _frequencies(found: Fields, key: str) -> tuple[float, ...]:
    items = found.list(key, MAX_FREQUENCIES)
    if not items:
        refuse(found.at(key), "at least one frequency", "none")
    each = (Fields({key: item}, found.where, (key,)) for item in items)
    numbers = tuple(one.number(key) for one in each)
    for number in numbers:
        if number < 0:
            refuse(found.at(key), "numbers of at least 0", number)
    return numbers


def _op_map(op: Op) -> dict[str, Any]:
    held = {key.name: getattr(op, key.name) for key in keys(type(op))}
    defaults = {key.name: key.default for key in keys(type(op)) if key.default is not MISSING}
    told = {key: value for key, value in held.items() if key not in defaults or value != defaults[key]}
    return {"op": op.name, **told}


def _rope_map(rope: Frequencies) -> dict[str, Any]:
    found: dict[str, Any] = {"frequencies": list(rope.frequencies)}
    if rope.factor != 1.0:
        found["factor"] = rope.factor
    if rope.long is not None:
        found |= {"long": list(rope.long), "original_context": rope.original_context}
    return found


def _refuse_unknown_words(metadata: Any) -> None:
    """Raise UnsupportedError for an op or a choice that this version does not know.

    This comes before anything is called damaged: a newer writer's keys beside it are no damage either.
    """
    if not isinstance(metadata, dict):
        return
    kinds = metadata.get("kinds")
    lists = [metadata.get("stem"), metadata.get("top"), *(kinds if isinstance(kinds, list) else ())]
    for item in (item for ops in lists if isinstance(ops, list) for item in ops if isinstance(item, dict)):
        name = item.get("op")
        if not isinstance(name, str):
            continue
        if name not in OPS:
            raise UnsupportedError(f"program: op {shown(name)} is not known to this version; {_UPDATE}")
        for key in keys(OPS[name]):
            word = item.get(key.name)
            if kind_of(key) == "choice" and isinstance(word, str) and word not in key.metadata["choices"]:
                raise UnsupportedError(
                    f"program: op {name!r}: {key.name} {shown(word)} is not known to this version; {_UPDATE}"
                )


