"""A program: a model's forward pass as data (spec/program.md). Read from metadata, and checked as a whole.

    stem (token id to values) -> for each layer the ops of its kind -> top (values to logits)

Values that the stem writes live through all layers; a layer may overwrite them. Any other value of a layer ends with
the layer. Tensor names inside a layer are relative: `model.layers.N.` is put before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rkf.errors import StructureError
from rkf.format.fields import Fields, integer, refuse
from rkf.model.frequencies import Frequencies
from rkf.model.op import Op, Weight, Width
from rkf.model.op_maps import (
    MAX_LAYERS,
    MAX_OPS,
    MAX_ROPES,
    MAX_SIZE,
    OpReader,
    op_map,
    refuse_unknown_words,
    rope_from_map,
    rope_map,
)
from rkf.model.ops import Attention, Conv, Delta, Embed, Gate, Logits, Norm, Rope, Scan

_KEEPERS = (Attention, Conv, Delta, Scan)  # what they keep of a sequence belongs to their layer


@dataclass(frozen=True, slots=True)
class Program:
    """kinds: the distinct layers; order: the kind of each layer, in order."""

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
        return _cache(self.layer(number))

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

    @property
    def final_norm(self) -> tuple[Op, ...]:
        """The top up to its last norm, which writes the hidden states that other libraries give out (a transform for
        the head may follow); empty if there is no norm.
        """
        return self.top[: max((at for at, op in enumerate(self.top, 1) if isinstance(op, Norm)), default=0)]

    def weights(self) -> Iterator[Weight]:
        """Every tensor by its full name, in the order of first use, each once.

        Lazily: with a forged number of layers, the first missing tensor ends it. Widths are computed once per kind.
        """
        found: dict[str, list[Weight]] = {}
        for where, _, op, widths in self._walk():
            found.setdefault(where, []).extend(op.weights(widths))
        relative = {where: _each_once(weights, where) for where, weights in found.items()}
        seen: dict[str, tuple[int, ...]] = {}
        places = [("", "stem"), *((layer_prefix(n), f"kind {kind}") for n, kind in enumerate(self.order)), ("", "top")]
        for prefix, where in places:
            for weight in relative.get(where, ()):
                full = weight._replace(name=prefix + weight.name)
                if full.name not in seen:
                    seen[full.name] = full.shape
                    yield full
                elif seen[full.name] != full.shape:
                    _refuse_shapes(full.name, seen[full.name], full.shape)

    def naming(self, tensor: str) -> str:
        """The op that names a tensor of `weights`, for messages: its place, and how names in a layer are read."""
        layer = layer_of(tensor)
        lists = [("", "stem", self.stem), ("", "top", self.top)]
        if layer is not None and layer < self.layers:
            lists.append((layer_prefix(layer), f"kind {self.order[layer]}", self.layer(layer)))
        for prefix, where, ops in lists:
            for number, op in enumerate(ops):
                if tensor in (prefix + name for name in op.tensor_names()):
                    return _place(where, number, op) + (f", whose names are relative to {prefix}" if prefix else "")
        raise KeyError(tensor)

    def widths(self) -> dict[str, Width]:
        """The type of each value; a value whose width differs by layer has its widest here."""
        found: dict[str, Width] = {}
        for _, _, op, widths in self._walk():
            written, before = op.width(widths), found.get(op.dst)
            if not (isinstance(before, int) and isinstance(written, int) and before >= written):
                found[op.dst] = written
        return found

    def to_metadata(self) -> dict[str, Any]:
        """The map of `metadata.model.program`; `from_metadata` is the inverse."""
        return {
            "kinds": [[op_map(op) for op in kind] for kind in self.kinds],
            "order": list(self.order),
            "ropes": [rope_map(rope) for rope in self.ropes],
            "stem": [op_map(op) for op in self.stem],
            "top": [op_map(op) for op in self.top],
        }

    @classmethod
    def from_metadata(cls, metadata: Any) -> Program:
        """The program of a map, checked completely except for the tensors.

        Raises UnsupportedError for an op, an activation or another word that this version does not know,
        StructureError for any other fault.
        """
        where = "program"
        refuse_unknown_words(metadata)
        top = Fields(metadata, where, ("kinds", "order", "ropes", "stem", "top"))
        ropes = tuple(rope_from_map(each, f"{where}, rope {n}") for n, each in enumerate(top.list("ropes", MAX_ROPES)))
        reader = OpReader(len(ropes))
        kinds = top.list("kinds", MAX_OPS)
        program = cls(
            stem=reader.ops(top.raw("stem"), "stem"),
            kinds=tuple(reader.ops(kind, f"kind {n}") for n, kind in enumerate(kinds)),
            order=tuple(
                integer(kind, top.at("order"), 0, max(len(kinds) - 1, 0)) for kind in top.list("order", MAX_LAYERS)
            ),
            top=reader.ops(top.raw("top"), "top"),
            ropes=ropes,
        )
        program.check()
        return program

    def check(self) -> None:
        """Raise StructureError for a program that cannot be run.

        Every value must be written before it is read, read after it is written, and have a width that fits. Layers may
        share only caches of earlier layers. The program must end with logits. Each kind is checked once, not per layer.
        """
        if not self.order:
            refuse("program, order", "at least one layer", "none")
        if set(self.order) != set(range(len(self.kinds))):
            refuse("program, order", "every kind at least once", f"{len(set(self.order))} of {len(self.kinds)}")
        for where, ops in self._lists():
            if not ops:
                refuse(f"program, {where}", "at least one op", "none")
            self._check_places(where, ops)
        for where, number, op, _ in self._walk():
            with _at(where, number):
                if isinstance(op, Embed):
                    enough = op.rows >= self.vocab_size
                    op.need(enough, f"at least {self.vocab_size} rows, one a token of the logits", op.rows)
                if isinstance(op, Rope):
                    turned = 2 * len(self.ropes[op.table].frequencies)
                    op.need(turned <= op.head_dim, f"at most {op.head_dim} numbers turned", turned)
        self._check_uses()
        self._check_caches()

    def _lists(self) -> Iterator[tuple[str, tuple[Op, ...]]]:
        """The lists of ops, each once, with their names in messages."""
        yield "stem", self.stem
        for number, kind in enumerate(self.kinds):
            yield f"kind {number}", kind
        yield "top", self.top

    def _check_places(self, where: str, ops: tuple[Op, ...]) -> None:
        """Embed belongs to the stem; ops with a layer's number or memory to a layer; logits to the end of the top."""
        in_layer = where not in ("stem", "top")
        for number, op in enumerate(ops):
            if isinstance(op, Embed) and where != "stem":
                refuse(_place(where, number, op), "embed in the stem alone", "one here")
            if not in_layer and (isinstance(op, _KEEPERS) or (isinstance(op, Gate) and op.by_layer)):
                refuse(_place(where, number, op), "no op that belongs to a layer", f"{op.name!r}")
            if isinstance(op, Logits) and (where != "top" or number != len(ops) - 1):
                refuse(_place(where, number, op), "logits once, as the last op of the top", "logits here")
        if where == "top" and not isinstance(ops[-1], Logits):
            refuse(_place(where, len(ops) - 1, ops[-1]), "logits as the last op of the top", f"{ops[-1].name!r}")

    def _walk(self) -> Iterator[tuple[str, int, Op, Mapping[str, Width]]]:
        """Every op of the stem, of each kind once and of the top, with its list, its number in it, and the types of the
        values before it.

        Raises StructureError if a value is not written yet, or does not fit.
        """
        held: dict[str, Width] = {}
        for where, ops in self._lists():
            inside = held if where == "stem" else dict(held)
            for number, op in enumerate(ops):
                for value in op.reads():
                    if value not in inside:
                        refuse(_place(where, number, op), "values that are written before", f"{value!r}")
                yield where, number, op, inside
                with _at(where, number):
                    inside[op.dst] = self._written(op, inside, held)

    def _written(self, op: Op, inside: Mapping[str, Width], held: Mapping[str, Width]) -> Width:
        """The type of what an op writes. inside: types of the values before it; held: of those that the stem writes."""
        if isinstance(op, Gate) and op.by_layer and op.b is not None:
            wanted = self.layers * op.vector(inside, op.a)
            op.need(inside[op.b] == wanted, f"{wanted} numbers in {op.b!r}", inside[op.b])
        written = op.width(inside)
        if isinstance(written, int):
            op.need(written <= MAX_SIZE, f"at most {MAX_SIZE} numbers", written)
        if held.get(op.dst, written) != written:
            op.need(False, f"{held[op.dst]} numbers, as the stem writes", written)
        return written

    def _check_uses(self) -> None:
        """Every written value must be read: within its list, or anywhere if the stem writes it."""
        everywhere = {value for _, ops in self._lists() for op in ops for value in op.reads()}
        lasting = {op.dst for op in self.stem} & everywhere
        for where, ops in self._lists():
            _check_reads(ops, where, lasting | ({ops[-1].dst} if where == "top" else set()))

    def _check_caches(self) -> None:
        """A layer has at most one cache and one state of each sort; it shares only an earlier layer's, of one shape."""
        for number, kind in enumerate(self.kinds):
            for sort in _KEEPERS:
                if sum(isinstance(op, sort) and getattr(op, "shares", None) is None for op in kind) > 1:
                    refuse(f"program, kind {number}", f"one {sort.name} that keeps something", "more")
        caches = [_cache(kind) for kind in self.kinds]
        first: dict[int, int] = {}  # the first layer of each kind: a layer before it is before all others of that kind
        for number, kind_number in enumerate(self.order):
            first.setdefault(kind_number, number)
        for kind_number, kind in enumerate(self.kinds):
            for at, op in enumerate(kind):
                if isinstance(op, Attention) and op.shares is not None:
                    before = first[kind_number]
                    with _at(f"kind {kind_number}", at):
                        op.need(op.shares < before, f"the cache of a layer before {before}", op.shares)
                        _check_shared(op, op.shares, caches[self.order[op.shares]])


@contextmanager
def _at(where: str, number: int) -> Iterator[None]:
    """Put an op's place before the message of a StructureError, which knows the op alone."""
    try:
        yield
    except StructureError as error:
        raise StructureError(f"program, {where}, op {number}, {error}") from None


def _place(where: str, number: int, op: Op) -> str:
    """An op in messages: its list, its number in it from 0, its name and what it writes."""
    return f"program, {where}, op {number}, {op}"


def _cache(ops: tuple[Op, ...]) -> Attention | None:
    """The op of a layer that writes keys and values."""
    return next((op for op in ops if isinstance(op, Attention) and op.shares is None), None)


def _check_shared(op: Attention, layer: int, own: Attention | None) -> None:
    """Refuse a shared cache that does not exist, has another shape, or no longer holds the positions needed."""
    if own is None:
        op.need(False, f"a layer {layer} that has a cache", "none")
        return
    shape, got = (own.kv_heads, own.head_dim, own.value_dim), (op.kv_heads, op.head_dim, op.value_dim)
    op.need(got == shape, f"kv_heads, head_dim, value_dim of layer {layer}: {shape}", got)
    held = own.reach is None or (op.reach is not None and op.reach <= own.reach)
    op.need(held, f"a window or chunk within that of layer {layer}, {own.reach}", op.reach)


def _each_once(weights: Iterable[Weight], where: str) -> list[Weight]:
    """The tensors without repeats, in the order of first use."""
    found: dict[str, Weight] = {}
    for weight in weights:
        kept = found.setdefault(weight.name, weight)
        if kept.shape != weight.shape:
            _refuse_shapes(f"{weight.name} of {where}", kept.shape, weight.shape)
    return list(found.values())


def _refuse_shapes(name: str, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    refuse(f"program, tensor {name!r}", f"one shape, {list(first)}", list(second))


def layer_prefix(number: int) -> str:
    """The prefix of the names of a layer's tensors."""
    return f"model.layers.{number}."


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None for the stem's and the top's. Inverts `layer_prefix`."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and len(parts) > 3 and parts[2].isdecimal() else None


def _check_reads(ops: Sequence[Op], where: str, keep: set[str]) -> None:
    """Refuse a value that no op reads before it is overwritten or, unless it is in `keep`, before the end."""
    waiting: dict[str, int] = {}  # value -> the op that wrote it
    for number, op in enumerate(ops):
        for value in op.reads():
            waiting.pop(value, None)
        if op.dst in waiting:
            expected = f"{op.dst!r} to be read before it is written again"
            refuse(_place(where, number, op), expected, "no op that reads it")
        waiting[op.dst] = number
    for value, number in waiting.items():
        if value not in keep:
            refuse(_place(where, number, ops[number]), f"a later op that reads {value!r}", "none")
