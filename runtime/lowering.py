"""Phases to the structs that kernels read: the places of values, the kernels, and the split into jobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.model.ops import Add, Attention, Clip, Embed, Gate, Norm, Op, Rope, Scale
from rkf.model.program import Program
from rkf.runtime.buffers import NOWHERE, TILE, Buffers, Place
from rkf.runtime.kv_cache import CacheLayout, padded_value_dim
from rkf.runtime.matrices import Memory
from rkf.runtime.phases import Micro, OpPhase, Phase, Product, ProductPhase, Stream, TokenPhase, Value
from rkf.runtime.structs import (
    ATTENTION,
    COUNTED,
    EMBED,
    JOB,
    MICRO,
    NORM,
    PACK,
    PAIR,
    PARTIAL_HEADER,
    PARTS,
    PRODUCT,
    ROPE,
    SCALE,
    TAKE,
    TOKENS,
)
from rkf.runtime.weights import Weights

_JOB_ROWS = 32  # the rows of a job are a multiple of this
_JOBS_PER_THREAD = 4  # per phase: enough for the other threads to take over a late thread's share
_ONCE, _TOKENS, _BLOCKS, _PAGES = range(len(COUNTED))
_PRODUCT_PARTS = {"linear": "products", "linear:added": "added products", "logits": "logits"}


class TokenArrays:
    """Arrays with one entry per token of a call (BATCH of structs.py), TILE of them. They keep their addresses, because
    a thread that is late for a call may still read them.
    """

    def __init__(self, memory: Memory) -> None:
        self.ids, self.positions, self.sequences, self.wanted = (np.zeros(TILE, np.int64) for _ in range(4))
        self.blocks = np.zeros(TILE + 1, np.int64)
        self.temperatures: dict[tuple[float, int], NDArray[np.float32]] = {}
        self._memory = memory
        for array in (self.ids, self.positions, self.sequences, self.wanted, self.blocks):
            memory.hold(array)

    def temperature(self, beta: float, length: int) -> NDArray[np.float32]:
        """Factors of queries by position, f32[TILE]; the caller of the kernels fills them in."""
        if (beta, length) not in self.temperatures:
            self.temperatures[beta, length] = np.zeros(TILE, np.float32)
            self._memory.hold(self.temperatures[beta, length])
        return self.temperatures[beta, length]


@dataclass(frozen=True, slots=True)
class Ground:
    """The common parts of all sections of a plan. addresses: of kernels by name; partials: see ATTENTION."""

    program: Program
    weights: Weights
    memory: Memory
    buffers: Buffers
    layout: CacheLayout
    arrays: TokenArrays
    addresses: Mapping[str, int]
    threads: int
    cache_format: str
    partials: int


def kernels_of(phase: Phase, cache_format: str) -> set[str]:
    """The names of the kernels that a phase needs."""
    if isinstance(phase, TokenPhase):
        return {"tokens", *(_micro_kernel(micro, cache_format) for micro in phase.micros)}
    if isinstance(phase, ProductPhase):
        return {phase.kind}
    return {_op_kernel(phase, cache_format)}


def partial_bytes(op: Attention) -> int:
    """Memory of one head's partial attention."""
    return PARTIAL_HEADER + padded_value_dim(op) * 4


class Section:
    """The stem, a layer or the top, lowered phase by phase.

    layer: its number, None outside of layers; held: columns of the values that live through all layers; top: its rows
    are the wanted tokens.
    """

    def __init__(self, ground: Ground, prefix: str, layer: int | None, held: Mapping[str, int], *, top: bool) -> None:
        self._ground, self._prefix, self._layer, self._top = ground, prefix, layer, top
        self.columns: dict[Value, int] = {}
        self._places: dict[Value, Place] = {}
        self._packed_apart: dict[str, bool] = {}
        for name, columns in held.items():
            value: Value = Stream(name) if top else name
            self.columns[value] = columns
            self._places[value] = ground.buffers.value(name, columns, private=False)

    def lower(self, phases: Iterable[Phase]) -> list[tuple[int, ...]]:
        """A PHASE for each."""
        found = []
        for phase in phases:
            if isinstance(phase, TokenPhase):
                found.append(self._token_phase(phase))
            elif isinstance(phase, ProductPhase):
                found.append(self._product_phase(phase))
            else:
                found.append(self._op_phase(phase))
        return found

    # --- values

    def _write(self, value: Value, columns: int, *, own: bool = False) -> Place:
        """The new place of a value that is written here."""
        name = ("top", value) if self._top else value
        self.columns[value] = columns
        self._places[value] = self._ground.buffers.value(name, columns, private=own)
        if isinstance(value, str):
            self._packed_apart.pop(value, None)
        return self._places[value]

    def _struct(self, dtype: np.dtype[Any], **fields: Any) -> int:
        """The address of a struct with these fields; all others are 0."""
        struct = np.zeros(1, dtype)
        for name, value in fields.items():
            struct[name] = value
        return self._ground.memory.hold(struct)

    def _vector(self, name: str | None, offset: float = 0.0) -> int:
        return 0 if name is None else self._ground.weights.vector(self._prefix + name, offset)

    # --- token phases

    def _token_phase(self, phase: TokenPhase) -> tuple[int, ...]:
        ground = self._ground
        micros = []
        for micro in phase.micros:
            work = ground.addresses[_micro_kernel(micro, ground.cache_format)]
            micros.append((work, self._micro(micro, phase.own)))
        work, arguments = micros[0]
        if len(micros) > 1:
            work = ground.addresses["tokens"]
            arguments = self._struct(TOKENS, micros=ground.memory.hold(np.array(micros, MICRO)), count=len(micros))
        return work, arguments, _TOKENS, 1, 0, int(phase.own), PARTS.index(_part_of(phase))

    def _micro(self, micro: Micro, own: bool) -> int:
        """The arguments of a micro-op."""
        source = self._places[micro.reads[0]] if micro.reads and micro.reads[0] in self._places else NOWHERE
        columns = self.columns.get(micro.reads[0], 0) if micro.reads else 0
        if micro.what == "take":
            out = self._write(micro.writes[0], columns, own=own)
            return self._struct(
                TAKE, source=source, out=out, rows=self._ground.arrays.wanted.ctypes.data, columns=columns
            )
        if micro.what == "pack":
            name = micro.reads[0]
            assert isinstance(name, str)
            self._packed_apart[name] = own
            address, private = self._ground.buffers.activation(source, columns, private=own)
            return self._struct(PACK, activation=address, private=private)
        if micro.op is None:
            out = self._write(micro.writes[0], columns, own=own)
            return self._struct(SCALE, source=source, out=out, columns=columns, scale=micro.scale)
        if isinstance(micro.op, Attention):
            return self._attention_micro(micro, micro.op, own)
        return self._plain_micro(micro, micro.op, source, columns, own)

    def _plain_micro(self, micro: Micro, op: Op, source: Place, columns: int, own: bool) -> int:
        """The arguments of an op that is exactly one micro-op."""
        written = self._written_columns(op)
        before = dict(self._places)
        out = self._write(op.dst, written, own=own)
        if isinstance(op, Embed):
            matrix, ids = self._ground.weights.matrix(self._prefix + op.table), self._ground.arrays.ids.ctypes.data
            return self._struct(EMBED, matrix=matrix, ids=ids, out=out, columns=written, scale=op.scale)
        if isinstance(op, Norm):
            return self._norm(op, source, out, columns)
        if isinstance(op, Rope):
            return self._rope(op, source, out, columns, micro.scale)
        if isinstance(op, Add):
            return self._struct(PAIR, a=source, b=before[op.b], out=out, columns=columns, scale=op.scale)
        if isinstance(op, Scale):
            factors = self._vector(op.weight)
            return self._struct(SCALE, source=source, out=out, columns=columns, factors=factors, scale=op.factor)
        if isinstance(op, Clip):
            return self._struct(PAIR, a=source, out=out, columns=columns, limit=op.limit)
        if isinstance(op, Gate):
            return self._gate(op, source, before, out, written)
        raise TypeError(op.name)

    def _written_columns(self, op: Op) -> int:
        columns = op.width({name: width for name, width in self.columns.items() if isinstance(name, str)})
        assert isinstance(columns, int)
        return columns

    def _norm(self, op: Norm, source: Place, out: Place, columns: int) -> int:
        size = op.group or columns
        if op.weight is not None:
            weight = self._vector(op.weight, op.offset)
        else:
            weight = self._ground.memory.hold(_ones(size))
        return self._struct(
            NORM,
            source=source,
            out=out,
            weight=weight,
            bias=self._vector(op.bias),
            columns=size,
            groups=columns // size,
            epsilon=op.epsilon,
        )

    def _rope(self, op: Rope, source: Place, out: Place, columns: int, scale: float) -> int:
        ground = self._ground
        return self._struct(
            ROPE,
            source=source,
            out=out,
            sequences=ground.arrays.sequences.ctypes.data,
            positions=ground.arrays.positions.ctypes.data,
            table=len(ground.layout.groups) + op.table,
            turned=len(ground.program.ropes[op.table].frequencies),
            head_dim=op.head_dim,
            heads=columns // op.head_dim,
            scale=scale,
        )

    def _gate(self, op: Gate, a: Place, places: Mapping[Value, Place], out: Place, columns: int) -> int:
        numbers = {"limit": op.limit or inf, "alpha": op.alpha, "shift": op.shift}
        if op.b is None:
            return self._struct(PAIR, a=a, out=out, columns=columns, **numbers)
        b = places[op.b]
        if op.by_layer:
            assert self._layer is not None
            b = b.later(self._layer * columns)
        single = {"a_single": columns > 1 == self.columns[op.a], "b_single": columns > 1 == self.columns[op.b]}
        return self._struct(PAIR, a=a, b=b, out=out, columns=columns, **single, **numbers)

    # --- products

    def _product_phase(self, phase: ProductPhase) -> tuple[int, ...]:
        """The jobs of the phase's products, split by rows."""
        products = [(self._product(product), product.op.rows) for product in phase.products]
        total, threads = sum(rows for _, rows in products), self._ground.threads
        jobs_wanted = 1 if threads == 1 else _JOBS_PER_THREAD * threads
        step = max(-(-total // jobs_wanted // _JOB_ROWS) * _JOB_ROWS, _JOB_ROWS)
        jobs = [(at, low, min(low + step, rows)) for at, rows in products for low in range(0, rows, step)]
        arguments = self._ground.memory.hold(np.array(jobs, JOB))
        part = PARTS.index(_PRODUCT_PARTS.get(phase.kind, "gated products"))
        return self._ground.addresses[phase.kind], arguments, _ONCE, len(jobs), 0, 0, part

    def _product(self, product: Product) -> int:
        op, weights, source = product.op, self._ground.weights, self._places[product.op.src]
        apart = self._packed_apart.get(op.src, bool(source.private))
        address, private = self._ground.buffers.activation(source, self.columns[op.src], private=apart)
        fields: dict[str, Any] = {
            "matrix": weights.matrix(self._prefix + op.weight, self._bias(product.op)),
            "input": address,
            "input_private": private,
            "top": self._top,
            "scale": 1.0,
        }
        if product.kind == "logits":
            fields |= {"scale": getattr(op, "scale", 1.0), "softcap": getattr(op, "softcap", None) or 0.0}
            return self._struct(PRODUCT, **fields)
        fields["y"] = self._write(op.dst, op.rows)
        if product.added is not None:
            fields |= {"out": self._places[product.added.a], "scale": product.added.scale}
        if product.partner is not None and product.gate is not None:
            partner, gate = product.partner, product.gate
            fields["partner"] = weights.matrix(self._prefix + partner.weight, self._bias(partner))
            fields["partner_y"] = self._write(partner.dst, partner.rows)
            fields |= {"limit": gate.limit or inf, "alpha": gate.alpha, "shift": gate.shift}
            fields["out"] = self._write(gate.dst, op.rows)
        return self._struct(PRODUCT, **fields)

    def _bias(self, op: Op) -> str | None:
        bias = getattr(op, "bias", None)
        return None if bias is None else self._prefix + bias

    # --- attention

    def _attention_micro(self, micro: Micro, op: Attention, own: bool) -> int:
        if micro.what == "keep":
            return self._attention(op, k=self._places[micro.reads[0]], v=self._places[micro.reads[1]])
        if micro.what == "join":
            return self._attention(op, out=self._write(op.dst, op.heads * op.value_dim, own=own))
        assert op.temperature_beta is not None and op.temperature_length is not None
        query = micro.reads[0]
        source, columns = self._places[query], self.columns[query]
        factors = self._ground.arrays.temperature(op.temperature_beta, op.temperature_length).ctypes.data
        out = self._write(query, columns, own=own)
        return self._struct(SCALE, source=source, out=out, columns=columns, factors=factors, by_token=1, scale=1.0)

    def _op_phase(self, phase: OpPhase) -> tuple[int, ...]:
        op, ground = phase.op, self._ground
        assert isinstance(op, Attention)
        query = next(value for value in phase.reads if value in self._places)
        work, part = ground.addresses[_op_kernel(phase, ground.cache_format)], PARTS.index("attention")
        if phase.what == "attend:one":
            return work, self._attention(op, q=self._places[query]), _PAGES, op.kv_heads, op.window or 0, 0, part
        places = {"q": self._places[query], "out": self._write(op.dst, op.heads * op.value_dim)}
        return work, self._attention(op, **places), _BLOCKS, op.kv_heads, 0, 0, part

    def _attention(self, op: Attention, **places: Place) -> int:
        ground, layer = self._ground, self._layer if op.shares is None else op.shares
        assert layer is not None
        slot, arrays = ground.layout.slots[layer], ground.arrays
        return self._struct(
            ATTENTION,
            **places,
            sequences=arrays.sequences.ctypes.data,
            positions=arrays.positions.ctypes.data,
            blocks=arrays.blocks.ctypes.data,
            group=slot.group,
            offset=slot.offset,
            head_bytes=slot.head_bytes,
            heads=op.heads,
            kv_heads=op.kv_heads,
            head_dim=op.head_dim,
            value_dim=op.value_dim,
            padded=padded_value_dim(op),
            window=op.window or 0,
            sinks=self._vector(op.sinks),
            partials=ground.partials,
            partial_bytes=partial_bytes(op),
            softcap=op.softcap or 0.0,
        )


def _micro_kernel(micro: Micro, cache_format: str) -> str:
    op = micro.op
    if micro.what == "keep":
        return f"remember:{cache_format}"
    if micro.what == "temper":
        return "scale"
    if isinstance(op, Norm):
        return "norm:centred" if op.centred else "norm:rms" if op.group is None else "norm:rms_of_groups"
    if isinstance(op, Rope):
        return f"rope:{op.pairs}"
    if isinstance(op, Gate):
        return f"activated:{op.act}" if op.b is None else f"gated:{op.act}"
    return micro.what


def _op_kernel(phase: OpPhase, cache_format: str) -> str:
    capped = ":capped" if isinstance(phase.op, Attention) and phase.op.softcap is not None else ""
    return f"{phase.what}:{cache_format}{capped}"


def _part_of(phase: TokenPhase) -> str:
    whats = {micro.what for micro in phase.micros}
    parts = (("embed", "embedding"), ("keep", "cache"), ("join", "attention"))
    return next((part for what, part in parts if what in whats), "vectors")


def _ones(size: int) -> NDArray[np.float32]:
    ones = np.zeros(-(-size // 128) * 128, np.float32)
    ones[:size] = 1
    return ones
