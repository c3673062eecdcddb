"""A model's tensors as the PLAN that a forward pass walks: matrices, jobs, norms, and buffers allocated once.

Which tensors exist decides what is done (biases, q/k norms, a head of its own); no architecture is named.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rkf.errors import UnsupportedError
from rkf.file.container import Container
from rkf.file.prefix import within
from rkf.format.matrix import DenseTensor
from rkf.model.first_form import ModelConfig
from rkf.runtime import jit
from rkf.runtime.kv_cache import head_bytes, padded_head_dim
from rkf.runtime.matrices import Memory, Prepared, clustered, dense
from rkf.runtime.structs import (
    ACTIVATION,
    BLOCK,
    BLOCK_TOKENS,
    CLAIM_SLOTS,
    JOB,
    LANES,
    LAYER,
    PACKED_BLOCK_BYTES,
    PAGE,
    PARTIAL_HEADER,
    PHASE_BITS,
    PHASES_PER_LAYER,
    PLAN,
    SLOT_BYTES,
    THREAD,
    TILE_ROWS,
)

EMBEDDING, HEAD = (
    "model.embed_tokens.weight",
    "lm_head.weight",
)  # the head is an alias of the embedding where they are tied
TILE = 256  # tokens of one pass
_JOB_ROWS = 32  # a job's rows are a multiple of this
_JOBS_PER_THREAD = 4  # of one phase: enough that a late thread finds its share taken by the others


class Network:
    """The plan of a model on some threads; `plan_array` and `thread_arrays` are what the step kernel reads."""

    def __init__(
        self,
        container: Container,
        config: ModelConfig,
        *,
        level: str,
        threads: int,
        exact: bool,
        cache_format: str,
        bits: int | None,
    ) -> None:
        self.config = config
        self._container, self._exact, self._threads, self._cache_format = container, exact, threads, cache_format
        self._bits = bits
        self._memory = Memory()
        self._prepared: dict[str, Prepared] = {}
        if config.layers * PHASES_PER_LAYER + 3 > 1 << PHASE_BITS:
            raise UnsupportedError(f"{container.path}: {config.layers} layers are more than this runtime can count")
        self._prepare(level)
        self.plan_array = np.zeros(1, PLAN)
        self.thread_arrays = np.zeros(threads, THREAD)
        self._fill_plan()
        self._fill_threads()

    def watch(self, clock: NDArray[np.int64]) -> None:
        """Let the first thread count its time there, as long as this lives."""
        self.thread_arrays[0]["clock"] = self._memory.hold(clock)

    # --- matrices

    def _prepare(self, level: str) -> None:
        """Every matrix of the model, and the kernels that they need."""
        names = [EMBEDDING, self._head]
        for layer in range(self.config.layers):
            names += [f"model.layers.{layer}.{part}.weight" for part in _LAYER_MATRICES]
        fast = None if self._exact else level
        for name, tensor in self._container.load_many(dict.fromkeys(names)):
            if isinstance(tensor, DenseTensor):
                self._prepared[name] = dense(tensor, self._memory)
            else:
                kept = tensor if self._bits is None else within(tensor, self._bits)
                self._prepared[name] = clustered(kept, self._memory, fast)
            bias = name.removesuffix("weight") + "bias"
            if bias in self._container.tensors:
                self._prepared[name].struct["bias"] = self._vector(bias)
        wanted = {
            kernel
            for item in self._prepared.values()
            for kernel in (item.kernels.one, item.kernels.many, item.kernels.row)
        }
        addresses = jit.addresses(sorted(wanted), level)
        for item in self._prepared.values():
            m = item.struct[0]
            m["multiply_one"], m["multiply_many"] = addresses[item.kernels.one], addresses[item.kernels.many]
            m["decode_row"] = addresses[item.kernels.row]

    @property
    def _head(self) -> str:
        return self._container.tensors[HEAD].target or HEAD

    def _matrix(self, name: str) -> NDArray:
        return self._prepared[name].struct

    def _vector(self, name: str) -> int:
        """A dense vector as f32, padded with zeros to whole blocks; 0 if the model has none of that name."""
        if name not in self._container.tensors:
            return 0
        values = self._container.decode(name).reshape(-1)
        return self._memory.hold(np.pad(values, (0, -len(values) % BLOCK)))

    # --- phases

    def _phase(self, pairs: Sequence[tuple[str, str | None, int]]) -> tuple[int, int]:
        """Jobs of matrices (name, partner, offset of the output in bytes), cut by rows."""
        total = sum(int(self._matrix(name)["rows"][0]) for name, _, _ in pairs)
        jobs_wanted = 1 if self._threads == 1 else _JOBS_PER_THREAD * self._threads
        step = max(-(-total // jobs_wanted // _JOB_ROWS) * _JOB_ROWS, _JOB_ROWS)
        jobs = []
        for name, partner, output in pairs:
            rows = int(self._matrix(name)["rows"][0])
            partner_address = self._matrix(partner).ctypes.data if partner else 0
            for low in range(0, rows, step):
                jobs.append((self._matrix(name).ctypes.data, partner_address, low, min(low + step, rows), output))
        return self._memory.hold(np.array(jobs, JOB)), len(jobs)

    def _layer(self, index: int) -> tuple:
        config, name = self.config, f"model.layers.{index}."
        query, kv = config.heads * config.head_dim * 4, config.kv_heads * config.head_dim * 4
        attention, feed = name + "self_attn.", name + "mlp."
        projections = [
            (f"{attention}{part}_proj.weight", None, at) for part, at in zip("qkv", (0, query, query + kv), strict=True)
        ]
        up_at = _padded(config.intermediate_size, LANES) * 4
        return (
            index,
            self._vector(name + "input_layernorm.weight"),
            self._vector(name + "post_attention_layernorm.weight"),
            self._vector(attention + "q_norm.weight"),
            self._vector(attention + "k_norm.weight"),
            self._phase(projections),
            self._phase([(attention + "o_proj.weight", None, 0)]),
            self._phase([(feed + "gate_proj.weight", feed + "up_proj.weight", up_at)]),
            self._phase([(feed + "down_proj.weight", None, 0)]),
        )

    # --- buffers

    def _fill_plan(self) -> None:
        config, plan, memory = self.config, self.plan_array[0], self._memory
        layers = np.array([self._layer(i) for i in range(config.layers)], LAYER)
        plan["layers"], plan["layer_count"] = memory.hold(layers), config.layers
        plan["hidden"] = config.hidden_size
        plan["heads"], plan["kv_heads"], plan["head_dim"] = config.heads, config.kv_heads, config.head_dim
        plan["padded_head_dim"] = padded_head_dim(config)
        plan["head_bytes"] = head_bytes(config, self._cache_format)
        plan["window"] = config.sliding_window or 0
        plan["epsilon"], plan["query_scale"] = config.norm_epsilon, config.head_dim**-0.5
        plan["embedding"] = self._matrix(EMBEDDING).ctypes.data
        plan["final_norm"] = self._vector("model.norm.weight")
        plan["head"] = self._phase([(self._head, None, 0)])
        projected = (config.heads + 2 * config.kv_heads) * config.head_dim
        for name, columns in (
            ("x", config.hidden_size),
            ("qkv", projected),
            ("gate_up", 2 * _padded(config.intermediate_size, LANES)),
            ("delta", config.hidden_size),
        ):
            plan[f"{name}_stride"] = _apart(_padded(columns, BLOCK) * 4)
            plan[name] = memory.zeros(int(plan[f"{name}_stride"]) * TILE)
        plan["partial_bytes"] = self._partial_bytes
        pages = -(-config.context_length // PAGE)
        try:
            plan["partials"] = memory.zeros(pages * config.heads * self._partial_bytes)
        except MemoryError:
            problem = f"a context of {config.context_length} tokens takes more memory than there is"
            raise UnsupportedError(f"{self._container.path}: {problem}") from None
        plan["slots"] = memory.zeros(2 * CLAIM_SLOTS * SLOT_BYTES)
        for name, columns in self._inputs():
            plan[name] = self._activation(columns, TILE)

    def _fill_threads(self) -> None:
        memory = self._memory
        widest = max(int(item.struct["columns"][0]) for item in self._prepared.values())
        scratch = 2 * TILE_ROWS * _padded(widest, BLOCK)  # rows of bytes and the same in panels, or 8 rows of f32
        for thread in self.thread_arrays:
            for name, columns in self._inputs():
                thread[name] = self._activation(columns, 1)
            # SwiGLU's output is everyone's; each thread packs it for itself.
            thread["feed_input"]["values"] = self.plan_array[0]["feed_input"]["values"]
            thread["scratch"] = memory.zeros(scratch)
            queries = BLOCK_TOKENS * self.config.heads // self.config.kv_heads
            thread["scores"] = memory.zeros(queries * PAGE * 4)
            thread["totals"], thread["parts"] = (memory.zeros(queries * self._partial_bytes) for _ in range(2))

    def _inputs(self) -> list[tuple[str, int]]:
        """The activations that products read, and their columns."""
        config = self.config
        return [
            ("norm_input", config.hidden_size),
            ("mixed_input", config.heads * config.head_dim),
            ("feed_input", config.intermediate_size),
        ]

    def _activation(self, columns: int, tokens: int) -> NDArray:
        a, memory = np.zeros((), ACTIVATION), self._memory
        padded = _padded(columns, BLOCK)
        a["columns"] = columns
        a["values_stride"], a["packed_stride"] = _apart(padded * 4), _apart(padded // BLOCK * PACKED_BLOCK_BYTES)
        a["values"] = memory.zeros(int(a["values_stride"]) * tokens)
        a["packed"] = memory.zeros(int(a["packed_stride"]) * tokens)
        a["scale"], a["total"] = memory.zeros(4 * tokens), memory.zeros(4 * tokens)
        return a

    @property
    def _partial_bytes(self) -> int:
        return PARTIAL_HEADER + padded_head_dim(self.config) * 4


_LAYER_MATRICES = [f"self_attn.{part}_proj" for part in "qkvo"] + [
    f"mlp.{part}_proj" for part in ("gate", "up", "down")
]


def _apart(size: int) -> int:
    """Bytes from one token to the next: a line more than the rows take. Tokens whole pages apart would compete for the
    same places in the caches (docs/log.md says what little is measured of it).
    """
    return size + 64


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
