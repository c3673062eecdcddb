"""An answer as text: a request to the engine, its tokens decoded, stop strings, times. Knows no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from sys import maxsize
from time import perf_counter

from rkf.errors import UsageError
from rkf.runtime.chooser import Chooser
from rkf.runtime.draft import Draft
from rkf.runtime.engine import Engine, Request
from rkf.runtime.lookup import Guesses
from rkf.text.tokenizer import TextStream


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

    def request(self, ids: Sequence[int], choose: Chooser, draft: Draft | None = None) -> Request:
        """A request that continues `ids` within these limits. draft: guesses where the text so far tells nothing."""
        guess = Guesses(None if draft is None else draft.text(choose))
        most = maxsize if self.max_tokens is None else len(ids) + self.max_tokens
        return Request(list(ids), choose, most=most, eos=frozenset(self.eos_ids), guess=guess)


class AnswerText:
    """The text of an answer's tokens, in whole characters, up to the first stop string."""

    def __init__(self, text: TextStream, stop: Sequence[str]) -> None:
        self._text, self._stop = text, StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.found

    def push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """The text that can be given out after these tokens, and how many of them belong to the answer: all, or those
        up to the end of a stop string.
        """
        text = ""
        for used, token in enumerate(tokens, 1):
            text += self._stop.push(self._text.push(token))
            if self.stopped:
                return text, used
        return text, len(tokens)

    def finish(self) -> str:
        """The rest, once no token comes any more."""
        return "" if self.stopped else self._stop.push(self._text.finish()) + self._stop.finish()


@dataclass(slots=True)
class Generation:
    """Pieces of text, generated during iteration, which is possible once. ids: the prompt and the generated tokens."""

    engine: Engine
    prompt: Sequence[int]
    choose: Chooser
    limits: Limits
    text: TextStream
    draft: Draft | None = None
    request: Request = field(init=False)
    stats: Stats = field(default_factory=Stats)

    def __post_init__(self) -> None:
        self.request = self.limits.request(self.prompt, self.choose, self.draft)
        self.engine.check(self.request)
        self.stats.prompt_tokens = self.request.prompt_tokens

    @property
    def ids(self) -> list[int]:
        return self.request.ids

    def __iter__(self) -> Iterator[str]:
        text = AnswerText(self.text, self.limits.stop)
        self.engine.submit(self.request)
        try:
            while not text.stopped and (tokens := self._next()):
                piece, used = text.push(tokens)
                if text.stopped:
                    self.engine.cut(self.request, len(tokens) - used)
                    self.stats.tokens = self.request.tokens
                if piece:
                    yield piece
        finally:  # also if the reader of the pieces has gone
            self.engine.cancel(self.request)
        self.stats.finish = "stop" if text.stopped else self.request.finish
        if piece := text.finish():
            yield piece

    def _next(self) -> list[int]:
        """The tokens of one timed step; none at the end. The first step computes the prompt."""
        began, before = perf_counter(), self.request.tokens
        while not (tokens := self.request.take()) and not self.request.ended:
            self.engine.step()
        elapsed = perf_counter() - began
        self.stats.tokens = self.request.tokens
        if before == 0:
            self.stats.prefill_s = elapsed
        else:
            self.stats.decode_s += elapsed
        return tokens


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

    def cut(self) -> tuple[str, str]:
        """The stop string that was found, and the text after it."""
        found = next(stop for stop in self._stops if self._held.startswith(stop))
        return found, self._held[len(found) :]

    def _unsettled(self) -> int:
        """The number of characters at the end of the held text that may begin a stop string."""
        longest = min(len(self._held), max((len(stop) - 1 for stop in self._stops), default=0))
        return next((n for n in range(longest, 0, -1) if self._begins(self._held[-n:])), 0)

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
