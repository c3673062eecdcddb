"""The loop from a prompt's ids to text: compute, sample, decode, stop. Knows Backend, no weights, no files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rkf.errors import ContextLengthError, UsageError
from rkf.runtime.backend import Row, Wanted
from rkf.runtime.sampling import Sampling, sample
from rkf.text.tokenizer import TextStream

if TYPE_CHECKING:
    from rkf.runtime.backend import Backend

F32 = NDArray[np.float32]
_NONE = np.empty(0, np.int64)
_OPENING = 16  # tokens at the end of a prompt; templates open an answer with up to ten
_WORTHWHILE = 64  # tokens; a mark costs a pass of its own, about as long as computing eight tokens more


class Session:
    """A backend's sequence and its ids, so that a conversation computes only new tokens."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._sequence = backend.new_sequence(backend.metadata.context_length)
        self._held: list[int] = []

    def next_logits(self, ids: Sequence[int]) -> F32:
        """Logits after all of `ids`, `f32[vocab]`; the longest beginning in the sequence is not computed again."""
        common = min(_common(self._held, ids), len(ids) - 1)  # always compute the last one, for its logits
        known = self._sequence.reusable(common)
        self._sequence.truncate(known)
        del self._held[known:]  # before computing, so that an interruption leaves a valid sequence
        for end in self._places_to_mark(known, common, len(ids)):
            self._compute(ids[known:end], _NONE)
            self._sequence.mark()
            known = end
        return self._compute(ids[known:], "last")[0]

    def _compute(self, ids: Sequence[int], wanted: Wanted) -> F32:
        """The wanted logits of more tokens."""
        logits = self._backend.forward([Row(self._sequence, np.asarray(ids, np.int64))], wanted)
        self._held.extend(ids)
        return logits

    def _places_to_mark(self, known: int, common: int, end: int) -> list[int]:
        """The lengths that later prompts are likely to go back to, of the tokens known … end - 1 that are to come.

        One is where this prompt leaves the last text: others may share that beginning, such as a system prompt. The
        other is shortly before the end, because the next turn's template may write the answer's beginning differently
        (without the tokens that open a model's thoughts).
        """
        if self._sequence.rewinds:
            return []
        near_end = end - _OPENING
        places = [common] if near_end - common >= _WORTHWHILE else []
        return [place for place in [*places, near_end] if place - known >= _WORTHWHILE]


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


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common beginning."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:  # the usual case, one token more each step, without a loop in Python
        return n
    return next(i for i in range(n) if a[i] != b[i])
