"""The loop from a prompt's ids to text: compute, sample, decode, stop. Knows Backend, no weights, no files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rkf.errors import ContextLengthError, UsageError
from rkf.runtime.backend import Row
from rkf.runtime.sampling import Sampling, sample
from rkf.text.tokenizer import TextStream

if TYPE_CHECKING:
    from rkf.model.metadata import ModelMetadata
    from rkf.runtime.backend import Backend

F32 = NDArray[np.float32]


class Session:
    """A backend's sequence and its ids, so that a conversation computes only new tokens."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._capacities = _capacities(backend.metadata)
        self._sequence = backend.new_sequence(self._capacities[0])
        self._held: list[int] = []

    def next_logits(self, ids: Sequence[int]) -> F32:
        """Logits after all of `ids`, `f32[vocab]`; the longest beginning in the sequence is not computed again."""
        if len(ids) > self._sequence.capacity and len(self._capacities) > 1:  # other ropes: nothing held is of use
            capacity = next((each for each in self._capacities if each >= len(ids)), self._capacities[-1])
            self._sequence, self._held = self._backend.new_sequence(capacity), []
        common = min(_common(self._held, ids), len(ids) - 1)  # always compute the last one, for its logits
        known = self._sequence.reusable(common)
        self._sequence.truncate(known)
        del self._held[known:]  # before computing, so that an interruption leaves a valid sequence
        new = np.asarray(ids[known:], np.int64)
        logits = self._backend.forward([Row(self._sequence, new)])
        self._held.extend(ids[known:])
        return logits[0]


@dataclass(slots=True)
class Stats:
    """Statistics of one generation. Times in seconds; finish is "eos", "stop" or "length", empty until it ends."""

    prompt_tokens: int = 0
    tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    finish: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a generation ends: max_tokens (None: the context's end), eos_ids, stop strings (not part of the text)."""

    max_tokens: int | None
    eos_ids: Sequence[int]
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise UsageError(f"max_tokens: expected 0 or more, got {self.max_tokens}")
        if "" in self.stop:
            raise UsageError("a stop string is empty: it would stop everything")


@dataclass(slots=True)
class Generation:
    """Pieces of text, generated during iteration, which is possible once. ids: the prompt and the generated tokens."""

    session: Session
    ids: list[int]
    sampling: Sampling
    limits: Limits
    context_length: int
    text: TextStream
    stats: Stats = field(default_factory=Stats)

    def __post_init__(self) -> None:
        if not self.ids:
            raise UsageError("the prompt is empty: expected at least one token")
        if len(self.ids) + (self.limits.max_tokens != 0) > self.context_length:
            raise ContextLengthError(
                f"the prompt has {len(self.ids)} tokens, the model's context {self.context_length}: shorten it to leave"
                " room for an answer"
            )
        self.stats.prompt_tokens = len(self.ids)

    def __iter__(self) -> Iterator[str]:
        stop = StopStrings(self.limits.stop)
        for token in self._tokens():
            if piece := stop.push(self.text.push(token)):
                yield piece
            if stop.found:
                self.stats.finish = "stop"
                return
        if piece := stop.push(self.text.finish()) + stop.finish():
            yield piece

    def _tokens(self) -> Iterator[int]:
        room = self.context_length - len(self.ids)
        wanted = room if self.limits.max_tokens is None else min(self.limits.max_tokens, room)
        eos = frozenset(self.limits.eos_ids)
        for _ in range(wanted):
            token = self._next()
            if token in eos:
                self.stats.finish = "eos"
                return
            yield token
        self.stats.finish = "length"

    def _next(self) -> int:
        """One timed step; the first one computes the prompt."""
        began = perf_counter()
        token = sample(self.session.next_logits(self.ids), self.sampling, self.ids)
        elapsed = perf_counter() - began
        if len(self.ids) == self.stats.prompt_tokens:
            self.stats.prefill_s = elapsed
        else:
            self.stats.decode_s += elapsed
        self.ids.append(token)
        self.stats.tokens += 1
        return token


class StopStrings:
    """Cuts a stream of text at the first stop string; holds back text that may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.found = tuple(stops), "", False

    def push(self, text: str) -> str:
        """The text that can be returned after `text` has arrived."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        self.found = bool(places)
        cut = min(places) if places else len(self._held) - self._unsettled()
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def finish(self) -> str:
        """The text held back, once no more comes."""
        text, self._held = self._held, ""
        return "" if self.found else text

    def _unsettled(self) -> int:
        """The number of characters at the end of the held text that may begin a stop string."""
        longest = min(len(self._held), max((len(stop) - 1 for stop in self._stops), default=0))
        return next((n for n in range(longest, 0, -1) if self._begins(self._held[-n:])), 0)

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


def _capacities(model: ModelMetadata) -> list[int]:
    """How long sequences may grow: to where a rope changes its frequencies, and to the context's end."""
    changes = {rope.original_context for rope in model.program.ropes if rope.long is not None and rope.original_context}
    return sorted({each for each in changes if each < model.context_length} | {model.context_length})


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common beginning."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:  # the usual case, one token more each step, without a loop in Python
        return n
    return next(i for i in range(n) if a[i] != b[i])
