"""Chooses the tokens of one answer by its sampling options and its form; tells log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rkf.runtime.guide import Guide
from rkf.runtime.sampling import Sampling, log_probabilities, sample

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability by the model alone, before any option, and the most likely tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Chooser:
    """Logits to the next token of one answer.

    top_logprobs: how many of the most likely tokens `logprobs` tells beside each chosen one (None: it stays empty).
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_tokens: int,
        guide: Guide | None = None,
        top_logprobs: int | None = None,
    ) -> None:
        self.sampling, self.logprobs = sampling, list[TokenLogprob]()
        self.prompt_tokens, self._guide, self._top = prompt_tokens, guide, top_logprobs

    def copy(self) -> Chooser:
        """One in the same state, to see ahead with; it tells no log-probabilities."""
        return Chooser(self.sampling, self.prompt_tokens, self._guide and self._guide.copy())

    def __call__(self, logits: F32, ids: Sequence[int]) -> int:
        allowed = self._guide.allowed() if self._guide else None
        token = sample(logits, self.sampling, ids, prompt_tokens=self.prompt_tokens, allowed=allowed)
        if self._guide:
            self._guide.accept(token)
        if self._top is not None:
            self.logprobs.append(logprob_of(token, logits, self._top))
        return token


def logprob_of(token: int, logits: F32, top: int) -> TokenLogprob:
    """logits: f32[vocab] from which a token was chosen; top: how many of the most likely to tell."""
    found = log_probabilities(logits)
    most = np.argpartition(-found, top)[:top] if 0 < top < len(found) else np.arange(top)
    ordered = most[np.argsort(-found[most], kind="stable")]
    return TokenLogprob(token, float(found[token]), tuple((int(each), float(found[each])) for each in ordered))
