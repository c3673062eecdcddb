"""Runs a program on batches of token sequences, one layer at a time, in numpy f32, for calibration. Knows no file.

The CPU backend holds all layers in memory; this holds one layer, for many sequences, and exposes the inputs of every
matrix. The bytes do not depend on the number of threads if BLAS uses one thread per call (`threadpoolctl`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from rkf.calibrate import arithmetic
from rkf.calibrate.arithmetic import F32, I64, Routed
from rkf.calibrate.batch_cache import BatchCache, KeyValues
from rkf.model import ops as model_ops
from rkf.model.op import Op
from rkf.model.program import Program, layer_prefix
from rkf.model.roles import shared_inputs
from rkf.numbers.hadamard_blocks import transformed

Ids = NDArray[np.integer]


class Factor(Protocol):
    """A matrix in another form than f32."""

    def product(self, x: F32) -> F32:
        """x weights^T, f32[tokens, rows]. x: f32[tokens, cols]"""
        ...


Weights = Mapping[str, "F32 | Factor | Sequence[Factor]"]
"""Tensors by their full names; a stack may be a sequence of matrices."""


class Seen(NamedTuple):
    """An input of some matrices.

    names: full names of the matrices, or of the stacks, that share this input. x: f32[tokens, cols]. expert: number of
    the matrix in the stacks; rows: i64, the rows of x that go to it.
    """

    names: tuple[str, ...]
    x: F32
    expert: int | None = None
    rows: I64 | None = None

    @property
    def tokens(self) -> int:
        return len(self.x) if self.rows is None else len(self.rows)

    def inputs(self) -> F32:
        """f32[tokens, cols]"""
        return self.x if self.rows is None else self.x[self.rows]


Tap = Callable[[Seen], None]


@dataclass(frozen=True, slots=True)
class Flow:
    """The values passed from one stretch of a program to the next, for a batch of sequences.

    ids: [batch, tokens]. values: f32[batch, tokens, width] by name, those that live through all layers. shared: keys
    and values by layer, for layers whose cache later ones read.
    """

    ids: Ids
    values: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[int, KeyValues] = field(default_factory=dict)


class Stretch:
    """The stem, one layer, or the top up to the input of the logits.

    names: full names of the tensors it needs, those of all ops except the logits. matrices: those that read the same
    value, by the first name of each group. multiplied: all of those. tables: the embeddings. positions: the maximum
    length of a sequence, which decides whether long rope tables are used.
    """

    def __init__(self, program: Program, ops: Sequence[Op], keeps: set[str], positions: int, layer: int = -1) -> None:
        self.ops, self.layer, self.layers = tuple(ops), layer, program.layers
        self.prefix = layer_prefix(layer) if layer >= 0 else ""
        needing = [op for op in ops if not isinstance(op, model_ops.Logits)]
        self.names = tuple(dict.fromkeys(self.prefix + name for op in needing for name in op.tensor_names()))
        self.matrices = {
            self.prefix + first: tuple(self.prefix + name for name in group)
            for first, group in shared_inputs(ops).items()
        }
        self.multiplied = frozenset(name for group in self.matrices.values() for name in group)
        self.tables = frozenset(self.prefix + op.table for op in ops if isinstance(op, model_ops.Embed))
        self.keeps = keeps
        self.is_shared = any(
            isinstance(op, model_ops.Attention) and op.shares == layer for kind in program.kinds for op in kind
        )
        self.ropes = [(np.array(rope.of(positions), np.float32), rope.factor) for rope in program.ropes]
        self.dying = _dying(ops, keeps)

    @classmethod
    def stem(cls, program: Program, positions: int) -> Stretch:
        return cls(program, program.stem, _lasting(program), positions)

    @classmethod
    def of_layer(cls, program: Program, layer: int, positions: int) -> Stretch:
        return cls(program, program.layer(layer), _lasting(program), positions, layer)

    @classmethod
    def top(cls, program: Program, positions: int) -> Stretch:
        return cls(program, program.top, {program.logits.src}, positions)

    def __call__(self, weights: Weights, flow: Flow, cache: BatchCache | None = None, tap: Tap | None = None) -> Flow:
        """The flow after this stretch. cache: the earlier tokens of the sequences, rounded to bf16; it is extended but
        not advanced. Without it, the sequences start here.
        """
        run = _Run(self, weights, flow, cache, tap)
        for op, dying in zip(self.ops, self.dying, strict=True):
            if isinstance(op, model_ops.Logits):  # its input is the end of the stretch
                run.see(op.weight, run.values[op.src])
                break
            run.values[op.dst] = _METHODS[type(op)](run, op)
            for name in dying:
                del run.values[name]
        return Flow(flow.ids, {name: run.values[name] for name in self.keeps}, run.shared)


def logits(op: model_ops.Logits, x: F32, weight: F32 | Factor, bias: F32 | None = None) -> F32:
    """f32[tokens, vocab]. x: f32[tokens, cols]."""
    out = _product(x, weight)
    if bias is not None:
        out += bias
    if op.scale != 1:
        out *= np.float32(op.scale)
    if op.softcap is not None:
        out = np.tanh(out / np.float32(op.softcap)) * np.float32(op.softcap)
    return out


def _product(x: F32, weights: F32 | Factor) -> F32:
    return x @ weights.T if isinstance(weights, np.ndarray) else weights.product(x)


def _lasting(program: Program) -> set[str]:
    """The values that live through all layers and are read after the stem."""
    read = {value for ops in (*program.kinds, program.top) for op in ops for value in op.reads()}
    return {op.dst for op in program.stem} & read


def _dying(ops: Sequence[Op], keeps: set[str]) -> list[set[str]]:
    """For each op, the values that no later op reads."""
    live, found = set(keeps), []
    for op in reversed(ops):
        reads = set(op.reads())
        found.append(reads - live - {op.dst})
        live = (live - {op.dst}) | reads
    return found[::-1]


class _Run:
    """One pass of one batch through one stretch."""

    def __init__(
        self, stretch: Stretch, weights: Weights, flow: Flow, cache: BatchCache | None, tap: Tap | None
    ) -> None:
        self.stretch, self.weights, self.cache, self.tap = stretch, weights, cache, tap
        self.ids, self.values, self.shared = flow.ids, dict(flow.values), dict(flow.shared)
        self.positions = (cache.length if cache else 0) + np.arange(flow.ids.shape[1])

    def see(self, name: str, x: F32, expert: int | None = None, rows: I64 | None = None) -> None:
        """Pass an input to the tap, once, at the first of the matrices that share it."""
        names = self.stretch.matrices.get(self.stretch.prefix + name)
        if self.tap is not None and names is not None:
            self.tap(Seen(names, x.reshape(-1, x.shape[-1]), expert, rows))

    def embed(self, op: model_ops.Embed) -> F32:
        rows = self._matrix(op.table)[self.ids]
        return rows if op.scale == 1 else rows * np.float32(op.scale)

    def norm(self, op: model_ops.Norm) -> F32:
        return arithmetic.normed(op, self.values[op.src], self._vector(op.weight), self._vector(op.bias))

    def linear(self, op: model_ops.Linear) -> F32:
        x = self.values[op.src]
        if op.parts is not None:
            return self._product_of_parts(op, x, op.parts)
        self.see(op.weight, x)
        return self._product(x, op.weight, op.bias)

    def _product_of_parts(self, op: model_ops.Linear, x: F32, parts: int) -> F32:
        found = []
        for part, own in enumerate(np.split(x.reshape(-1, x.shape[-1]), parts, axis=1)):
            self.see(op.weight, own, part)
            found.append(self._expert_product(own, op.weight, None, part))
        out = np.concatenate(found, axis=1).reshape(*x.shape[:-1], op.rows)
        bias = self._vector(op.bias)
        return out if bias is None else out + bias

    def rope(self, op: model_ops.Rope) -> F32:
        frequencies, factor = self.stretch.ropes[op.table]
        return arithmetic.turned(op, self.values[op.src], arithmetic.rotation(frequencies, factor, self.positions))

    def attention(self, op: model_ops.Attention) -> F32:
        keys, values = self._keys_values(op)
        return arithmetic.attended(op, self.values[op.q], keys, values, self._vector(op.sinks), self.positions)

    def gate(self, op: model_ops.Gate) -> F32:
        a, b = self.values[op.a], None if op.b is None else self.values[op.b]
        if op.by_layer and b is not None:
            start = self.stretch.layer * a.shape[-1]
            b = b[..., start : start + a.shape[-1]]
        if op.act == "xielu":
            numbers = (cast(F32, self._vector(name)) for name in (op.alpha_p, op.alpha_n, op.beta, op.eps))
            return arithmetic.xielu(a if op.limit is None else np.minimum(a, np.float32(op.limit)), *numbers)
        return arithmetic.gated(op, a, b)

    def route(self, op: model_ops.Route) -> Routed:
        found = self._product(self.values[op.src], op.weight, op.bias)
        return arithmetic.routed(op, found, self._vector(op.select), self._vector(op.expert_scale))

    def experts(self, op: model_ops.Experts) -> F32:
        x, chosen = self.values[op.src], self.values[op.route]
        flat = x.reshape(-1, x.shape[-1])
        experts = chosen.experts.reshape(len(flat), -1)
        shares = chosen.weights.reshape(len(flat), -1)
        out = np.zeros((len(flat), op.rows), np.float32)
        for expert in np.unique(experts):
            rows, place = np.nonzero(experts == expert)
            share = shares[rows, place][:, None]
            out[rows] += self._expert(op, int(expert), flat, rows, share)
        return out.reshape(*x.shape[:-1], op.rows)

    def _expert(self, op: model_ops.Experts, expert: int, flat: F32, rows: I64, share: F32) -> F32:
        """The contribution of one expert to the tokens `rows`. share: f32[tokens, 1], its weight for each of them."""
        x = flat[rows]
        if op.scale_input:
            x = x * share
            self.see(op.gate, x, expert)
        else:
            self.see(op.gate, flat, expert, rows)
        gate = self._expert_product(x, op.gate, op.gate_bias, expert)
        inner = arithmetic.gated(op, gate, self._expert_product(x, op.up, op.up_bias, expert))
        self.see(op.down, inner, expert)
        out = self._expert_product(inner, op.down, op.down_bias, expert)
        return out if op.scale_input else out * share

    def add(self, op: model_ops.Add) -> F32:
        b = self.values[op.b]
        out: F32 = self.values[op.a] + (b if op.scale == 1 else b * np.float32(op.scale))
        return out

    def concat(self, op: model_ops.Concat) -> F32:
        a, b = (self.values[name].reshape(*self.ids.shape, op.heads, -1) for name in (op.a, op.b))
        return np.concatenate([a, b], axis=-1).reshape(*self.ids.shape, -1)

    def scale(self, op: model_ops.Scale) -> F32:
        out: F32 = self.values[op.src] * np.float32(op.factor)
        weight = self._vector(op.weight)
        return out if weight is None else out * weight

    def conv(self, op: model_ops.Conv) -> F32:
        x, weight = self.values[op.src], cast(F32, self._vector(op.weight))
        zero = (len(x), op.taps - 1, x.shape[-1])
        out, after = arithmetic.convolved(x, self._state(op, zero), weight, self._vector(op.bias), op.act)
        self._keep_state(op, after)
        return out

    def delta(self, op: model_ops.Delta) -> F32:
        x, a, b = (self.values[name] for name in (op.src, op.a, op.b))
        a_log, dt_bias = (cast(F32, self._vector(name)) for name in (op.a_log, op.dt_bias))
        state = self._state(op, (len(x), op.value_heads, op.key_dim, op.value_dim))
        out, after = arithmetic.delta_rule(op, x, a, b, a_log, dt_bias, state)
        self._keep_state(op, after)
        return out

    def scan(self, op: model_ops.Scan) -> F32:
        x, dt = self.values[op.src], self.values[op.dt]
        a_log, dt_bias, d = (cast(F32, self._vector(name)) for name in (op.a_log, op.dt_bias, op.d))
        state = self._state(op, (len(x), op.heads, op.state_dim, op.head_dim))
        out, after = arithmetic.scanned(op, x, dt, a_log, dt_bias, d, state)
        self._keep_state(op, after)
        return out

    def clip(self, op: model_ops.Clip) -> F32:
        return np.clip(self.values[op.src], np.float32(-op.limit), np.float32(op.limit))

    def hadamard(self, op: model_ops.Hadamard) -> F32:
        return transformed(self.values[op.src], op.block)

    def _keys_values(self, op: model_ops.Attention) -> KeyValues:
        """All keys and values that the op may see."""
        tokens, layer = self.ids.shape[1], self.stretch.layer
        if op.shares is not None:
            return self.cache.read(op.shares, tokens) if self.cache else self.shared[op.shares]
        keys, values = (arithmetic.by_head(self.values[name], op.kv_heads) for name in (op.k, op.v) if name is not None)
        if self.cache:
            return self.cache.extend(layer, keys, values)
        if self.stretch.is_shared:
            self.shared[layer] = keys, values
        return keys, values

    def _state(self, op: Op, shape: tuple[int, ...]) -> F32:
        """The op's state after the earlier tokens, zero at the start."""
        kept = self.cache.states.get((self.stretch.layer, op.name)) if self.cache else None
        return np.zeros(shape, np.float32) if kept is None else kept

    def _keep_state(self, op: Op, state: F32) -> None:
        if self.cache:
            self.cache.states[self.stretch.layer, op.name] = state

    def _matrix(self, name: str) -> Any:
        return self.weights[self.stretch.prefix + name]

    def _vector(self, name: str | None) -> F32 | None:
        return None if name is None else cast(F32, self.weights[self.stretch.prefix + name])

    def _product(self, x: F32, weight: str, bias: str | None) -> F32:
        out = _product(x.reshape(-1, x.shape[-1]), self._matrix(weight)).reshape(*x.shape[:-1], -1)
        added = self._vector(bias)
        return out if added is None else out + added

    def _expert_product(self, x: F32, weight: str, bias: str | None, expert: int) -> F32:
        out = _product(x, self._matrix(weight)[expert])
        added = self._vector(bias)
        return out if added is None else out + added[expert]


_METHODS: Mapping[type[Op], Callable[[_Run, Any], Any]] = {
    model_ops.OPS[name]: getattr(_Run, name) for name in model_ops.OPS if name != model_ops.Logits.name
}
