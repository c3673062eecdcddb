"""The CPU backend: a container's model on this machine's threads. Knows no text."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from rkf.errors import BindingError, ContextLengthError, UsageError
from rkf.file.container import Container
from rkf.format.constants import MAX_K, index_bits
from rkf.model.first_form import ModelConfig
from rkf.model.rope import RopeTable
from rkf.runtime import cpu_features, jit
from rkf.runtime.backend import F32, I64
from rkf.runtime.kv_cache import FORMATS, KvCache
from rkf.runtime.plan import TILE, Network
from rkf.runtime.structs import BATCH, BLOCK_TOKENS, PAGE, PARTS
from rkf.runtime.threads import Pool, chosen

MAX_BITS = index_bits(MAX_K)


class CpuBackend:
    """A model ready to run. exact: f32 arithmetic on the decoded weights, the reference for the fast path.

    cache_format: "f32", "f16" or "int8"; None: f32 in exact mode, else f16. bits: read no more rank planes of a matrix
    than hold so many bits a weight (rkf/file/prefix.py).
    """

    def __init__(
        self,
        container: Container,
        threads: int | None = None,
        exact: bool = False,
        cache_format: str | None = None,
        bits: int | None = None,
    ) -> None:
        self.config = ModelConfig.from_metadata(container.metadata["model"])
        self.exact = exact
        self.threads = chosen(threads)
        self._cache_format = cache_format or ("f32" if exact else "f16")
        if self._cache_format not in FORMATS:
            raise UsageError(f"cache format {cache_format}: expected one of {', '.join(FORMATS)}")
        if bits is not None and not 1 <= bits <= MAX_BITS:
            raise UsageError(f"bits: expected 1 to {MAX_BITS}, got {bits}")
        if bits is not None and container.order == "none":
            raise BindingError(
                f"{container.path}: bits={bits} needs values in ascending order, and these are in none: leave it out"
            )
        level = cpu_features.level()
        self._network = Network(
            container,
            self.config,
            level=level,
            threads=self.threads,
            exact=exact,
            cache_format=self._cache_format,
            bits=bits,
        )
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
        logits = np.empty((1 if last_only else len(ids), self.config.vocab_size), np.float32)
        with self._lock:
            self._check(ids, [cache], len(ids))
            cache.reserve(cache.length + len(ids))
            for start in range(0, len(ids), TILE):
                part = ids[start : start + TILE]
                wanted: F32 | None = logits[start : start + TILE]
                if last_only:
                    wanted = logits if start + TILE >= len(ids) else None
                positions = np.arange(cache.length, cache.length + len(part))
                self._pass(part, positions, [cache], wanted, all_logits=not last_only)
                cache.length += len(part)
        return logits

    def forward_batch(self, tokens: I64, caches: Sequence[KvCache]) -> F32:
        """Feed one token to each of some sequences (`tokens: i64[n]`, n different caches) in one pass over the weights;
        `f32[n, vocab]`.
        """
        ids = np.ascontiguousarray(tokens, np.int64)
        if not len(ids) == len(caches) == len({id(cache) for cache in caches}):
            raise UsageError(f"batch: expected a cache of its own for each of {len(ids)} tokens, got {len(caches)}")
        logits = np.empty((len(ids), self.config.vocab_size), np.float32)
        with self._lock:
            self._check(ids, caches, 1)
            for cache in caches:
                cache.reserve(cache.length + 1)
            for start in range(0, len(ids), TILE):
                some = caches[start : start + TILE]
                positions = np.array([cache.length for cache in some])
                part = slice(start, start + TILE)
                self._pass(ids[part], positions, some, logits[part], all_logits=True)
            for cache in caches:
                cache.length += 1
        return logits

    def watch(self) -> I64:
        """Where the calling thread's time goes from now on: i64[1 + len(PARTS)], which structs.py explains, in ticks of
        a constant rate; whoever reads may set all but the first to zero.
        """
        clock = np.zeros(1 + len(PARTS), np.int64)
        self._network.watch(clock)
        return clock

    def _check(self, ids: I64, caches: Sequence[KvCache], each: int) -> None:
        if ids.ndim != 1 or not len(ids):
            raise UsageError(f"tokens: expected i64[n] with n >= 1, got shape {ids.shape}")
        for cache in caches:
            if cache.length + each > cache.capacity:
                raise ContextLengthError(
                    f"{cache.length + each} tokens do not fit into a context of {cache.capacity}; shorten the prompt"
                )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise UsageError(f"token ids must lie in 0..{self.config.vocab_size - 1}, got {ids.min()}..{ids.max()}")

    def _pass(
        self, ids: I64, positions: I64, caches: Sequence[KvCache], logits: F32 | None, *, all_logits: bool
    ) -> None:
        """One call of the step kernel: at most TILE tokens, of one sequence or each of its own."""
        last = int(positions[-1] if len(caches) == 1 else positions.max())
        pages = np.array([cache.pages for cache in caches])
        if len(caches) < len(ids):
            pages = np.full(len(ids), pages[0])
        first_page = max(last - (self.config.sliding_window or last + 1) + 1, 0) // PAGE
        self._batch[0] = (  # all fields at once: one by one they take ten microseconds
            len(ids),
            ids.ctypes.data,
            positions.ctypes.data,
            pages.ctypes.data,
            self._rope.address(last + 1),
            0 if logits is None else logits.ctypes.data,
            self.config.vocab_size * 4,
            all_logits,
            first_page,
            last // PAGE + 1 - first_page,
            BLOCK_TOKENS if len(caches) == 1 else 1,
        )
        self._pool.run()
