"""A program as the PLAN that threads run: its phases on this machine, and memory that is allocated once.

program -> phases (phases.py) -> structs (lowering.py) -> one PLAN and a THREAD each
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from rkf.errors import UnsupportedError
from rkf.file.container import Container
from rkf.model.metadata import ModelMetadata
from rkf.model.op import Op
from rkf.model.ops import Attention, Embed, Experts, Linear, Logits, Rope, Route
from rkf.model.program import layer_prefix
from rkf.runtime import jit
from rkf.runtime.buffers import TILE, Buffers, padded
from rkf.runtime.kv_cache import CacheLayout
from rkf.runtime.lower_attention import partial_bytes, score_bytes
from rkf.runtime.lowering import kernels_of, lowered
from rkf.runtime.matrices import Memory
from rkf.runtime.phases import Phase, phases, top_phases
from rkf.runtime.section import Ground, PlanSection, TokenArrays
from rkf.runtime.structs import (
    BLOCK,
    BLOCK_TOKENS,
    CLAIM_SLOTS,
    COUNT_BITS,
    LANES,
    PAGE,
    PHASE,
    PLAN,
    SLOT_BYTES,
    THREAD,
    TILE_ROWS,
)
from rkf.runtime.weights import Weights

F32 = NDArray[np.float32]
_KNOWN = (
    *("embed", "norm", "linear", "rope", "attention", "gate", "route", "experts", "add", "scale", "conv", "delta"),
    *("scan", "concat", "clip", "hadamard", "logits"),
)
_NOT_IN_TOP = (Embed, Rope, Route, Experts)


class Plan:
    """The plan of a model for a number of threads; the step kernel reads `plan_array` and `thread_arrays`.

    layout: how sequences store keys and values; arrays: those that a call fills in per token; most_phases: the maximum
    of one call; hidden: f32[TILE, width], the hidden states of a call that wants them (None: the program has none).
    """

    def __init__(
        self,
        container: Container,
        model: ModelMetadata,
        *,
        level: str,
        threads: int,
        exact: bool,
        cache_format: str,
        bits: int | None,
    ) -> None:
        self._model, self._path = model, container.path
        self._refuse_unknown()
        memory = self._memory = Memory()
        weights = Weights(container, model.program, memory, level=None if exact else level, bits=bits)
        self.layout = CacheLayout(model.program, cache_format)
        self.arrays = TokenArrays(memory)
        sections = {many: list(self._sections(weights, many)) for many in (False, True)}
        # In the form for many tokens, so that even one token's states are where all threads see them.
        hidden = top_phases(model.program.final_norm, streams=_stem_values(model), fast=frozenset(), many=True)
        every = [*hidden, *(phase for found in sections.values() for section in found for phase in section)]
        kernels = {name for phase in every for name in kernels_of(phase, cache_format)}
        addresses = jit.addresses(sorted(kernels | weights.kernels), level)
        weights.link(addresses)
        ground = Ground(
            program=model.program,
            weights=weights,
            memory=memory,
            buffers=Buffers(memory),
            layout=self.layout,
            arrays=self.arrays,
            addresses=addresses,
            threads=threads,
            cache_format=cache_format,
            partials=self._partials(memory),
        )
        self.plan_array = np.zeros(1, PLAN)
        self.thread_arrays = np.zeros(threads, THREAD)
        self.hidden: F32 | None = None
        self.most_phases = self._fill_plan(ground, sections, hidden)
        self._fill_threads(ground)

    def watch(self, clock: NDArray[np.int64]) -> None:
        """Let the first thread count its time in `clock`, for the life of this plan."""
        self.thread_arrays[0]["clock"] = self._memory.hold(clock)

    # --- phases

    def _refuse_unknown(self) -> None:
        """Refuse what this runtime cannot run, by name, before anything is loaded."""
        program = self._model.program
        for where, ops in (("stem", program.stem), *(("layers", kind) for kind in program.kinds), ("top", program.top)):
            for op in ops:
                if op.name not in _KNOWN or (where == "top" and isinstance(op, _NOT_IN_TOP)):
                    raise UnsupportedError(
                        f"{self._path}: program, {where}: the CPU runtime has no op {op.name!r}; update rkf"
                    )
        for op in self._attentions():
            most = -(-self._model.context_length // PAGE) * op.kv_heads
            if most >= 1 << COUNT_BITS:
                raise UnsupportedError(
                    f"{self._path}: a context of {self._model.context_length} tokens with {op.kv_heads} key heads is"
                    " more than this runtime can count"
                )

    def _sections(self, weights: Weights, many: bool) -> Iterator[list[Phase]]:
        """The phases of the stem, of each layer, and of the top."""
        program = self._model.program
        lasting = _stem_values(self._model)

        def fast(prefix: str, ops: tuple[Op, ...]) -> frozenset[str]:
            names = [op.weight for op in ops if isinstance(op, (Linear, Logits, Route))]
            names += [name for op in ops if isinstance(op, Experts) for name in (op.gate, op.up, op.down)]
            return frozenset(name for name in names if weights.is_fast(prefix + name))

        @cache
        def of_kind(kind: int, fast: frozenset[str]) -> list[Phase]:
            return phases(program.kinds[kind], lasting=lasting, fast=fast, many=many)

        yield phases(program.stem, lasting=lasting, fast=fast("", program.stem), many=many)
        for number, kind in enumerate(program.order):
            yield of_kind(kind, fast(layer_prefix(number), program.kinds[kind]))
        yield top_phases(program.top, streams=lasting, fast=fast("", program.top), many=many)

    def _attentions(self) -> list[Attention]:
        return [op for kind in self._model.program.kinds for op in kind if isinstance(op, Attention)]

    # --- structs

    def _fill_plan(
        self, ground: Ground, sections: Mapping[bool, Sequence[Sequence[Phase]]], hidden: Sequence[Phase]
    ) -> int:
        """Lower all phases; returns the maximum number of a call."""
        plan, memory, counts = self.plan_array[0], self._memory, []
        plan["slots"], plan["threads"] = memory.zeros(2 * CLAIM_SLOTS * SLOT_BYTES), ground.threads
        for many, (stem, *layers, top) in sections.items():
            first = PlanSection(ground, "", None, {}, top=False)
            body = lowered(first, stem)
            held = {value: first.columns[value] for value in _stem_values(self._model)}
            for number, layer in enumerate(layers):
                body += lowered(PlanSection(ground, layer_prefix(number), number, held, top=False), layer)
            last = lowered(PlanSection(ground, "", None, held, top=True), top)
            name = "many" if many else "one"
            plan[name], plan[f"{name}_count"] = memory.hold(np.array(body, PHASE)), len(body)
            plan[f"top_{name}"], plan[f"top_{name}_count"] = memory.hold(np.array(last, PHASE)), len(last)
            counts.append((len(body), len(last)))
        states = self._lowered_hidden(ground, held, hidden)
        plan["hidden"], plan["hidden_count"] = memory.hold(np.array(states, PHASE)), len(states)
        counts.append((0, len(states)))
        return sum(map(max, zip(*counts, strict=True)))

    def _lowered_hidden(
        self, ground: Ground, held: Mapping[str, int], phases: Sequence[Phase]
    ) -> list[tuple[int, ...]]:
        section = PlanSection(ground, "", None, held, top=True)
        found = lowered(section, phases)
        if found:
            value = self._model.program.final_norm[-1].dst
            place = section.places[value]
            self.hidden = ground.memory.rows(place.address, TILE, section.columns[value], place.stride)
        return found

    def _partials(self, memory: Memory) -> int:
        """Partial attentions of one token, [pages, heads], with pages for the longest context."""
        pages = -(-self._model.context_length // PAGE)
        size = max((op.heads * partial_bytes(op) for op in self._attentions()), default=0)
        try:
            return memory.zeros(pages * size)
        except MemoryError:
            problem = f"a context of {self._model.context_length} tokens takes more memory than there is"
            raise UnsupportedError(f"{self._path}: {problem}") from None

    def _fill_threads(self, ground: Ground) -> None:
        widest = max(ground.weights.most_columns, ground.buffers.widest)
        scratch = 2 * TILE_ROWS * padded(widest, BLOCK)  # rows of bytes and the same in panels, or 8 rows of f32
        attentions = self._attentions()
        scores = max((BLOCK_TOKENS * op.heads // op.kv_heads * score_bytes(op) for op in attentions), default=0)
        totals = max((BLOCK_TOKENS * op.heads // op.kv_heads * partial_bytes(op) for op in attentions), default=0)
        for thread in self.thread_arrays:
            thread["memory"] = ground.buffers.thread_memory()
            thread["scratch"], thread["scores"] = self._memory.zeros(scratch), self._memory.zeros(scores)
            thread["totals"], thread["parts"] = self._memory.zeros(totals), self._memory.zeros(totals)
            thread["outputs"] = self._memory.zeros(2 * TILE * 4 * padded(ground.buffers.widest, LANES))


def _stem_values(model: ModelMetadata) -> tuple[str, ...]:
    """The values that live through all layers."""
    return tuple(dict.fromkeys(op.dst for op in model.program.stem))
