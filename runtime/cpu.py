"""The CPU backend: a container's model on this machine's threads. Knows no text."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from rkf.config import ModelConfig
from rkf.container import Container
from rkf.errors import ContextLengthError, UsageError
from rkf.runtime import cpu_features, jit
from rkf.runtime.backend import F32, I64
from rkf.runtime.kv_cache import KvCache
from rkf.runtime.layout import BATCH, PAGE
from rkf.runtime.network import TILE, Network
from rkf.runtime.rope import RopeTable
from rkf.runtime.threads import Pool, chosen


class CpuBackend:
    """A model ready to run. exact: f32 arithmetic on the decoded weights, the reference for the fast path."""

    def __init__(self, container: Container, threads: int | None = None, exact: bool = False) -> None:
        self.config = ModelConfig.from_metadata(container.metadata["model"])
        self.exact = exact
        self.threads = chosen(threads)
        self._cache_format = "f32" if exact else "f16"
        level = cpu_features.level()
        self._network = Network(container, self.config, level=level, threads=self.threads, exact=exact)
        self._rope = RopeTable(self.config)
        self._batch = np.zeros(1, BATCH)
        step = f"step:{self._cache_format}"
        kernels = jit.addresses([step, "serve", "publish"], level)
        kernels["step"] = kernels.pop(step)
        plan, batch = self._network.plan_array.ctypes.data, self._batch.ctypes.data
        self._pool = Pool(kernels, plan, batch, self._network.thread_arrays, keep=(self._network, self._batch))
        self._lock = threading.Lock()

    def new_cache(self, tokens: int) -> KvCache:
        """An empty cache that can grow to `tokens` positions."""
        return KvCache(self.config, min(tokens, self.config.context_length), self._cache_format)

    def forward(self, tokens: I64, cache: KvCache, last_only: bool) -> F32:
        """Feed `tokens: i64[n]` after what the cache holds; logits of all of them or of the last, `f32[n or 1,
        vocab]`.
        """
        ids = np.ascontiguousarray(tokens, np.int64)
        with self._lock:
            return self._forward(ids, cache, last_only)

    def _forward(self, ids: I64, cache: KvCache, last_only: bool) -> F32:
        self._check(ids, cache)
        cache.reserve(cache.length + len(ids))
        logits = np.empty((1 if last_only else len(ids), self.config.vocab_size), np.float32)
        for start in range(0, len(ids), TILE):
            part = ids[start : start + TILE]
            wanted: Any = None
            if not last_only:
                wanted = logits[start : start + TILE]
            elif start + TILE >= len(ids):
                wanted = logits
            self._pass(part, cache, wanted, not last_only)
            cache.length += len(part)
        return logits

    def _check(self, ids: I64, cache: KvCache) -> None:
        if ids.ndim != 1 or not len(ids):
            raise UsageError(f"tokens: expected i64[n] with n >= 1, got shape {ids.shape}")
        if cache.length + len(ids) > cache.capacity:
            raise ContextLengthError(
                f"{cache.length + len(ids)} tokens do not fit into a context of {cache.capacity}; shorten the prompt"
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise UsageError(f"token ids must lie in 0..{self.config.vocab_size - 1}, got {ids.min()}..{ids.max()}")

    def _pass(self, ids: I64, cache: KvCache, logits: F32 | None, all_logits: bool) -> None:
        """One call of the step kernel: at most TILE tokens."""
        batch, first = self._batch[0], cache.length
        positions = np.arange(first, first + len(ids))
        pages = np.full(len(ids), cache.page_addresses.ctypes.data)
        last = first + len(ids) - 1
        first_page = max(last - (self.config.sliding_window or last + 1) + 1, 0) // PAGE
        batch["tokens"], batch["ids"], batch["positions"] = len(ids), ids.ctypes.data, positions.ctypes.data
        batch["pages"], batch["rope"] = pages.ctypes.data, self._rope.address(last + 1)
        batch["logits"] = 0 if logits is None else logits.ctypes.data
        batch["logits_stride"], batch["all_logits"] = self.config.vocab_size * 4, all_logits
        batch["first_page"], batch["page_count"] = first_page, last // PAGE + 1 - first_page
        self._pool.run()
