"""The CPU backend: a container's model on this machine's threads. Knows no text."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.errors import BindingError, UsageError
from rkf.file.container import Container
from rkf.format.constants import MAX_K, index_bits
from rkf.model.metadata import ModelMetadata
from rkf.model.rope_table import GROWTH, RopeTable
from rkf.runtime import cpu_features, jit, objects
from rkf.runtime.backend import F32, I64, NO_HIDDEN, Row, Wanted, checked, with_tokens_again
from rkf.runtime.buffers import TILE
from rkf.runtime.kv_cache import FORMATS
from rkf.runtime.paged_sequence import PagedSequence
from rkf.runtime.plan import Plan
from rkf.runtime.structs import BATCH, BLOCK_TOKENS, PARTS
from rkf.runtime.threads import Pool, chosen

MAX_BITS = index_bits(MAX_K)


class CpuBackend:
    """A model ready to run. exact: f32 arithmetic on the decoded weights, the reference for the fast path.

    cache_format: of kv_cache.FORMATS; None: f32 in exact mode, otherwise int16. bits: read only the rank planes that
    fit into this many bits per weight (rkf/file/prefix.py).

    arithmetic: what the bits of keys and values depend on, beside the weights.
    """

    def __init__(
        self,
        container: Container,
        threads: int | None = None,
        exact: bool = False,
        cache_format: str | None = None,
        bits: int | None = None,
    ) -> None:
        self.metadata = _metadata(container)
        self.exact = exact
        self.threads = chosen(threads)
        cache_format = cache_format or ("f32" if exact else "int16")
        if cache_format not in FORMATS:
            raise UsageError(f"cache format {cache_format}: expected one of {', '.join(FORMATS)}")
        if bits is not None and not 1 <= bits <= MAX_BITS:
            raise UsageError(f"bits: expected 1 to {MAX_BITS}, got {bits}")
        if bits is not None and container.order == "none":
            raise BindingError(
                f"{container.path}: bits={bits} needs values in ascending order, and these are unordered: omit it"
            )
        self.arithmetic = {
            "arithmetic": "exact" if exact else "fast",
            "number format of the cache": cache_format,
            "bits": str(bits),
            "version of rkf": objects.edition(),
        }
        level = cpu_features.level()
        self._plan = Plan(
            container,
            self.metadata,
            level=level,
            threads=self.threads,
            exact=exact,
            cache_format=cache_format,
            bits=bits,
        )
        self._ropes = _Ropes(self.metadata)
        self._batch = np.zeros(1, BATCH)
        kernels = jit.addresses(["step", "serve", "publish"], level)
        plan, batch = self._plan.plan_array.ctypes.data, self._batch.ctypes.data
        self._pool = Pool(
            kernels,
            plan,
            batch,
            self._plan.thread_arrays,
            phases=self._plan.most_phases,
            keep=(self._plan, self._batch),
        )
        self._lock = threading.Lock()
        self.pass_tokens = TILE

    @property
    def held_bytes(self) -> int:
        """Keys, values and states of all sequences."""
        return self._plan.layout.held.bytes

    def new_sequence(self, capacity: int) -> PagedSequence:
        """An empty sequence that can grow to `capacity` tokens."""
        capacity = min(capacity, self.metadata.context_length)
        return PagedSequence(self._plan.layout, capacity, self.metadata.program.ropes)

    def most_sequence_bytes(self, tokens: int) -> int:
        """What the arrays of a sequence of so many tokens take at most, its ids included."""
        return self._plan.layout.most_bytes(tokens) + 8 * tokens

    def restored(self, capacity: int, ids: I64, arrays: Mapping[str, NDArray[Any]]) -> PagedSequence:
        """A sequence of `ids` from what PagedSequence.to_arrays gave. ValueError: it was none of this model."""
        if not len(ids) or ids.min() < 0 or ids.max() >= self.metadata.vocab_size:
            raise ValueError("damaged: no tokens of this model")
        capacity = min(capacity, self.metadata.context_length)
        return PagedSequence.from_arrays(self._plan.layout, capacity, self.metadata.program.ropes, ids, arrays)

    def forward(self, rows: Sequence[Row], wanted: Wanted = "last") -> F32:
        """Compute each row's tokens in its sequence. Returns the wanted logits, `f32[wanted, vocab]` (backend.py). A
        sequence's logits have the same bits alone, in any mix of rows, and for any split of its tokens into calls.
        """
        return self._computed(rows, wanted, self.metadata.vocab_size, hidden=False)

    def hidden(self, rows: Sequence[Row], wanted: Wanted = "last") -> F32:
        """As `forward`, with hidden states in place of logits: `f32[wanted, width]` (backend.py)."""
        if self._plan.hidden is None:
            raise UsageError(NO_HIDDEN)
        return self._computed(rows, wanted, self._plan.hidden.shape[1], hidden=True)

    def watch(self) -> I64:
        """Measure the calling thread's time from now on: i64[1 + len(PARTS)], explained in structs.py, in ticks of a
        constant rate. The reader may set all but the first to zero.
        """
        clock = np.zeros(1 + len(PARTS), np.int64)
        self._plan.watch(clock)
        return clock

    def _computed(self, rows: Sequence[Row], wanted: Wanted, columns: int, *, hidden: bool) -> F32:
        """f32[wanted, columns]: logits, or hidden states."""
        with self._lock:
            rows, places = with_tokens_again(rows, checked(rows, wanted, self.metadata.vocab_size))
            found = np.empty((len(places), columns), np.float32)
            done = at = 0
            for part in _passes(rows):
                tokens = sum(len(ids) for _, ids in part)
                end = int(np.searchsorted(places, at + tokens))
                self._pass(part, places[done:end] - at, found[done:end], hidden)
                done, at = end, at + tokens
        return found

    def _pass(self, part: Sequence[Row], wanted: I64, found: F32, hidden: bool) -> None:
        """One call of the step kernel: at most TILE tokens."""
        arrays, blocks, segments, at = self._plan.arrays, [0], [0], 0
        self._ropes.reach(max(sequence.length + len(ids) for sequence, ids in part))
        for sequence, ids in part:
            count, length = len(ids), sequence.length
            sequence.reserve(count)
            self._ropes.give_to(sequence)
            arrays.ids[at : at + count] = ids
            arrays.positions[at : at + count] = length if count == 1 else np.arange(length, length + count)
            arrays.sequences[at : at + count] = sequence.address
            blocks += range(at + BLOCK_TOKENS, at + count, BLOCK_TOKENS)
            at += count
            blocks.append(at)
            segments.append(at)
        arrays.blocks[: len(blocks)] = blocks
        arrays.segments[: len(segments)] = segments
        arrays.wanted[: len(wanted)] = wanted
        for (beta, every, offset), factors in arrays.temperatures.items():
            factors[:at] = 1 + beta * np.log(1 + (arrays.positions[:at] + offset) // every)
        self._batch[0] = (  # all fields in one assignment: one by one they take ten microseconds
            at,
            len(wanted),
            found.ctypes.data,
            found.strides[0],
            int(hidden),
            int(arrays.positions[at - 1]),
            len(blocks) - 1,
            len(part),
        )
        self._pool.run()
        if hidden and self._plan.hidden is not None:
            found[:] = self._plan.hidden[: len(found)]
        for sequence, ids in part:
            sequence.advance(len(ids))


class _Ropes:
    """The tables of a program's ropes, including those for long sequences, up to the longest sequence so far."""

    def __init__(self, model: ModelMetadata) -> None:
        self._ropes, self._limit = model.program.ropes, model.context_length
        self._tables: dict[tuple[int, bool], RopeTable] = {}
        self._reached = self._version = 0

    def reach(self, positions: int) -> None:
        """Grow the tables to `positions`. Sequences must then get the new addresses."""
        if positions > self._reached:
            self._reached = max(positions, min(self._reached + GROWTH, self._limit))
            self._version += 1

    def give_to(self, sequence: PagedSequence) -> None:
        """Write the tables' addresses into a sequence's words."""
        choice = sequence.rope_choice
        version = self._version, choice.number
        if sequence.named_ropes != version:
            sequence.name_ropes([self._address(n, choice.positions) for n in range(len(self._ropes))], version)

    def _address(self, number: int, positions: int) -> int:
        rope = self._ropes[number]
        frequencies = rope.of(positions)
        key = number, frequencies is rope.long
        if key not in self._tables:
            self._tables[key] = RopeTable(frequencies, rope.factor, self._limit)
        return self._tables[key].address(self._reached)


def _passes(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows in parts of at most TILE tokens."""
    part: list[Row] = []
    room = TILE
    for sequence, tokens in rows:
        rest = np.ascontiguousarray(tokens, np.int64)
        while len(rest) >= room:
            yield [*part, Row(sequence, rest[:room])]
            rest, part, room = rest[room:], [], TILE
        if len(rest):
            part.append(Row(sequence, rest))
            room -= len(rest)
    if part:
        yield part


def _metadata(container: Container) -> ModelMetadata:
    if container.model is None:
        raise UsageError(f"{container.path}: expected a model, got a file without one")
    return container.model
