"""The places of values in a section of a program (the stem, a layer or the top), lowered onto a plan's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.model.ops import Attention
from rkf.model.program import Program
from rkf.runtime.buffers import TILE, Buffers, Place, packed_bytes
from rkf.runtime.items import Stream, Value
from rkf.runtime.kv_cache import CacheLayout
from rkf.runtime.matrices import Memory
from rkf.runtime.weights import Weights

_JOB_ROWS = 32  # the rows of a job are a multiple of this
_JOBS_PER_THREAD = 2  # per phase: others can take over a late thread's share, and rows seldom change cores


class TokenArrays:
    """Arrays with one entry per token of a call (BATCH of structs.py), TILE of them. They keep their addresses, because
    a thread that is late for a call may still read them.
    """

    def __init__(self, memory: Memory) -> None:
        self.ids, self.positions, self.sequences, self.wanted = (np.zeros(TILE, np.int64) for _ in range(4))
        self.blocks, self.segments = np.zeros(TILE + 1, np.int64), np.zeros(TILE + 1, np.int64)
        self.temperatures: dict[tuple[float, int, int], NDArray[np.float32]] = {}
        self._memory = memory
        for array in (self.ids, self.positions, self.sequences, self.wanted, self.blocks, self.segments):
            memory.hold(array)

    def temperature(self, op: Attention) -> NDArray[np.float32]:
        """Factors of queries by position, f32[TILE]; the caller of the kernels fills them in."""
        key = op.temperature_beta or 0.0, op.temperature_length or 1, op.temperature_offset or 0
        if key not in self.temperatures:
            self.temperatures[key] = np.zeros(TILE, np.float32)
            self._memory.hold(self.temperatures[key])
        return self.temperatures[key]


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

    def job_rows(self, total: int) -> int:
        """The rows of one job, in a phase with `total` rows."""
        wanted = 1 if self.threads == 1 else _JOBS_PER_THREAD * self.threads
        return max(-(-total // wanted // _JOB_ROWS) * _JOB_ROWS, _JOB_ROWS)


class PlanSection:
    """The values of the stem, a layer or the top, as phases write and read them.

    layer: its number, None outside of layers; held: columns of the values that live through all layers; top: its rows
    are the wanted tokens.
    """

    def __init__(self, ground: Ground, prefix: str, layer: int | None, held: Mapping[str, int], *, top: bool) -> None:
        self.ground, self.prefix, self.layer, self.top = ground, prefix, layer, top
        self.columns: dict[Value, int] = {}
        self.places: dict[Value, Place] = {}
        self._packed_apart: dict[Value, bool] = {}
        self._rounded: set[Value] = set()
        for name, columns in held.items():
            value: Value = Stream(name) if top else name
            self.columns[value] = columns
            self.places[value] = ground.buffers.value(name, columns, private=False)

    def write(self, value: Value, columns: int, *, own: bool = False, rows: int = 1) -> Place:
        """The new place of a value that is written here. own: every thread writes its own; rows: per token."""
        name = ("top", value) if self.top else value
        self.columns[value] = columns
        self.places[value] = self.ground.buffers.value(name, columns, private=own, rows=rows)
        self._packed_apart.pop(value, None)
        self._rounded.discard(value)
        return self.places[value]

    def pack(self, value: Value, *, own: bool, rows: int = 1, rounded: bool = False) -> tuple[int, int]:
        """The activation for packing a value: its address, and 1 if that is relative to a thread's private memory."""
        self._packed_apart[value] = own
        if rounded:
            self._rounded.add(value)
        return self.activation(value, rows=rows)

    def copies(self, value: Value, source: Value, rows: int) -> int:
        """Write a value whose rows are copies of a packed value's rows; returns the bytes of a packed row."""
        columns, rounded = self.columns[source], source in self._rounded
        self.write(value, columns, rows=rows)
        if rounded:
            self._rounded.add(value)
        return packed_bytes(columns, rounded)

    def activation(self, value: Value, *, rows: int = 1) -> tuple[int, int]:
        """The activation of a value that products read, where it was packed last."""
        place = self.places[value]
        apart = self._packed_apart.get(value, bool(place.private))
        rounded = value in self._rounded
        return self.ground.buffers.activation(place, self.columns[value], private=apart, rows=rows, rounded=rounded)

    def struct(self, dtype: np.dtype[Any], **fields: Any) -> int:
        """The address of a struct with these fields; all others are 0."""
        struct = np.zeros(1, dtype)
        for name, value in fields.items():
            struct[name] = value
        return self.ground.memory.hold(struct)

    def vector(self, name: str | None, offset: float = 0.0) -> int:
        """The address of a tensor of this section, 0 for none."""
        return 0 if name is None else self.ground.weights.vector(self.prefix + name, offset)

    def decoded(self, name: str) -> NDArray[np.float32]:
        """A dense tensor of this section as f32."""
        return self.ground.weights.decoded(self.prefix + name)

    def matrix(self, name: str, bias: str | None = None) -> int:
        """The address of the MATRIX of a tensor of this section."""
        return self.ground.weights.matrix(self.prefix + name, None if bias is None else self.prefix + bias)
