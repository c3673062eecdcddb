"""Guesses of the next tokens by a smaller model of the same tokenizer (Leviathan et al. 2023, speculative decoding).

The smaller model draws with the same sampling options, seed and positions as the larger one (sampling.py), so that
sampled tokens come true too. As with every guess, no text changes (lookup.py): the engine keeps the
tokens that the larger model chooses anyway. Guesses are as long as pays, by measured times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from rkf.errors import RkfError
from rkf.runtime.backend import Row
from rkf.runtime.beginnings import Beginnings, Held, common

if TYPE_CHECKING:
    from rkf.runtime.backend import F32, Backend, Wanted
    from rkf.runtime.chooser import Chooser

_MOST = 8  # tokens of a guess
_TEXTS = 2  # that have a sequence: as many as the engine lets guess
_MEASURED = 16  # times of each kind of which the median counts
_FIRST = 4  # tokens without a guess, to measure what one takes
_DRAFT, _FURTHER = 0.3, 0.25  # a token of the draft, and one more in a pass, in tokens of the model; until measured
_PROMPT = 8  # unread tokens for each token of the answer, beyond which the draft does not begin
_CATCHING_UP = 4  # tokens to read before a guess that take about as long as one
_PRIOR, _MEMORY = (3.0, 1.0), 0.9  # tokens that came true and not; how much of them the next guess counts
_PAUSE, _LONGEST_PAUSE = 32, 512  # tokens without a guess while guessing does not pay, doubled each time
_PROBE, _HOPE = 2, 0.95  # tokens of the guess after a pause, if it pays where this share comes true


class Draft:
    """The smaller model, for all texts of a larger one with `vocab_size` tokens. It holds the last two texts."""

    def __init__(self, backend: Backend, vocab_size: int) -> None:
        self.costs = Costs()
        self._backend, self._vocab_size = backend, vocab_size
        self._capacity = backend.metadata.context_length
        self._beginnings = Beginnings(backend, self._capacity, 0)
        self._texts: list[Held] = []  # the last begun is the last

    def text(self, chooser: Chooser) -> DraftText:
        """Guesses for one answer."""
        return DraftText(self, chooser)

    def held(self, held: Held | None, ids: Sequence[int]) -> Held:
        """The sequence of a text, with nothing in it but a beginning of `ids`; a new one if it has none any more."""
        if held is None or held not in self._texts:
            begun = self._beginnings.begin(list(ids), len(ids) - 1, self._texts)
            sequence = self._backend.new_sequence(self._capacity) if begun is None else begun.sequence
            held = Held(sequence, list(ids[: sequence.length]))
            self._texts = [*self._texts[1 - _TEXTS :], held]
        same = min(common(held.ids, list(ids)), len(ids) - 1, held.sequence.length)
        held.sequence.truncate(held.sequence.reusable(same))
        del held.ids[held.sequence.length :]
        return held

    def guess(self, held: Held, ids: Sequence[int], chooser: Chooser, count: int) -> list[int]:
        """At most `count` tokens after `ids`. No tokens while it still reads a long prompt: each call computes one pass
        of that, so that other requests need not wait.
        """
        missing = list(ids[held.sequence.length :])
        if len(ids) + count > self._capacity or max(missing) >= self._backend.metadata.vocab_size:
            return []
        if len(missing) > self._backend.pass_tokens:
            self._read(held, missing[: self._backend.pass_tokens], np.empty(0, np.int64))
            return []
        began = perf_counter()
        logits = self._read(held, missing)
        if not held.sequence.rewinds:
            held.sequence.mark()
        guessed = [chooser(logits[-1, : self._vocab_size], ids)]
        while len(guessed) < count and guessed[-1] not in self._backend.metadata.eos_ids:
            logits = self._read(held, guessed[-1:])
            guessed.append(chooser(logits[-1, : self._vocab_size], [*ids, *guessed]))
        if len(missing) <= _CATCHING_UP:
            self.costs.draft.append((perf_counter() - began) / len(guessed))
        return guessed

    def _read(self, held: Held, tokens: list[int], wanted: Wanted = "last") -> F32:
        logits = self._backend.forward([Row(held.sequence, np.array(tokens, np.int64))], wanted)
        held.ids += tokens
        return logits


class DraftText:
    """Guesses for one text that only grows."""

    def __init__(self, draft: Draft, chooser: Chooser) -> None:
        self._draft, self._chooser = draft, chooser
        self._held: Held | None = None
        self._true, self._wrong = _PRIOR
        self._next, self._pause = 0, _PAUSE
        self._guess: list[int] = []
        self._guessed_at, self._done_at = 0, 0.0

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """The tokens that may follow `ids`, which begin with those of the last call; often none."""
        self._learn(ids)
        try:
            self._guess = self._guessed(ids)
        except RkfError:  # no memory, no finite logits, too complex a form: the text goes on without guesses
            self._guess = []
        self._guessed_at, self._done_at = len(ids), perf_counter()
        return self._guess

    def _guessed(self, ids: Sequence[int]) -> list[int]:
        costs = self._draft.costs
        if len(ids) < self._next or not costs.known or not costs.best(_HOPE):
            return []
        count = costs.best(self._true / (self._true + self._wrong))
        self._held = self._draft.held(self._held, ids)
        # A short answer must not wait until the draft has read a long prompt.
        if len(ids) - self._held.sequence.length > _PROMPT * (len(ids) - self._chooser.prompt_tokens):
            return []
        if count:
            self._pause = _PAUSE
        else:
            self._next, self._pause, count = len(ids) + self._pause, min(2 * self._pause, _LONGEST_PAUSE), _PROBE
        return self._draft.guess(self._held, ids, self._chooser.copy(), count)

    def _learn(self, ids: Sequence[int]) -> None:
        """Count what came true of the last guess, and the time of the pass that computed it."""
        came = ids[self._guessed_at :]
        if not self._guessed_at or len(came) > len(self._guess) + 1:  # others have guessed since
            return
        self._draft.costs.passed(1 + len(self._guess), perf_counter() - self._done_at)
        if self._guess:
            right = common(self._guess, list(came))
            self._true = _MEMORY * self._true + right
            self._wrong = _MEMORY * self._wrong + (right < len(self._guess))


class Costs:
    """What guesses cost on this machine, in seconds. draft: of one token of the draft."""

    def __init__(self) -> None:
        self.draft, self._one, self._further = (deque[float](maxlen=_MEASURED) for _ in range(3))

    @property
    def known(self) -> bool:
        """Whether enough passes without a guess were measured."""
        return len(self._one) >= _FIRST

    def passed(self, tokens: int, seconds: float) -> None:
        """Count a pass of the larger model."""
        if tokens == 1:
            self._one.append(seconds)
        elif self._one:
            self._further.append(max(seconds - median(self._one), 0.0) / (tokens - 1))

    def best(self, likely: float) -> int:
        """The number of tokens to guess, each true with the probability `likely` if those before it are: that with the
        most tokens a second, 0 if guesses do not pay.
        """
        one = median(self._one)
        each = (median(self.draft) if self.draft else _DRAFT * one) + (
            median(self._further) if self._further else _FURTHER * one
        )

        def rate(count: int) -> float:
            return sum(likely**n for n in range(count + 1)) / (one + count * each)

        return max(range(_MOST + 1), key=rate)
