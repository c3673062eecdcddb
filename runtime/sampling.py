"""Logits to the next token: greedy, temperature, top-k, top-p, min-p, penalties, biases. Pure functions; no model, no
state.

Randomness is counter-based: the draw for position p under seed s does not depend on earlier draws, so (seed, position)
is enough to repeat a text. Options that are not used cost nothing: greedy is one argmax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.errors import SemanticsError, UsageError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

BOOL = NDArray[np.bool_]

_FIRST_CUT = 64  # candidates sorted first for top-p; nearly always enough, and sorting a whole vocabulary takes 3 ms
_MOST = 1e30  # of a penalty or a bias: sums with logits stay finite in f32


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token. Temperature 0 is greedy: of the other options, penalties and biases still have an effect.
    None turns an option off.

    The order: logit_bias (added to the logits of token ids); repetition_penalty (Keskar et al. 2019, prompt included);
    presence_penalty and frequency_penalty (OpenAI's: subtracted from the logits of tokens of the answer, once and for
    each occurrence); temperature; top_k; top_p (Holtzman et al. 2020); min_p (Nguyen et al. 2024: at least min_p times
    the most likely token's probability).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, _number(self.temperature) and self.temperature >= 0, ">= 0")
        _require("top_k", self.top_k, self.top_k is None or (_whole(self.top_k) and self.top_k >= 1), ">= 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            above = name == "top_p"  # 0 would leave no token
            holds = value is None or (_number(value) and (value > 0 or not above) and 0 <= value <= 1)
            _require(name, value, holds, "in (0, 1]" if above else "in [0, 1]")
        holds = _number(self.repetition_penalty) and 1 / _MOST <= self.repetition_penalty <= _MOST
        _require("repetition_penalty", self.repetition_penalty, holds, "> 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(name, getattr(self, name), _moderate(getattr(self, name)), "a finite number")
        finite = all(_whole(token) and _moderate(bias) for token, bias in self.logit_bias.items())
        _require("logit_bias", self.logit_bias, finite, "finite numbers by token id")
        _require("seed", self.seed, _whole(self.seed) and 0 <= self.seed < 1 << 64, "in 0 .. 2^64 - 1")


def sample(
    logits: F32,
    sampling: Sampling,
    previous: Sequence[int] = (),
    *,
    prompt_tokens: int = 0,
    allowed: BOOL | None = None,
) -> int:
    """The token after `previous`. logits: f32[vocab], left unchanged; previous: all ids so far, the prompt's
    `prompt_tokens` first; allowed: bool[vocab], the tokens to choose from (None: all).
    """
    logits = adjusted(logits, sampling, previous, prompt_tokens)
    best = int(np.argmax(logits))
    if not np.isfinite(logits[best]):
        problem = f"the largest logit after {len(previous)} tokens is {logits[best]}"
        raise SemanticsError(f"{problem}; `rkf verify` checks the file")
    if allowed is not None:
        logits = np.where(allowed, logits, np.float32(-np.inf))
    if sampling.temperature == 0.0:
        return best if allowed is None else int(np.argmax(logits))
    ids, probabilities = candidates(logits, sampling)
    return int(ids[choose(probabilities, uniform(sampling.seed, len(previous)))])


def adjusted(logits: F32, sampling: Sampling, previous: Sequence[int], prompt_tokens: int) -> F32:
    """The logits with biases and penalties: the same array if there are none, otherwise a copy."""
    if sampling.logit_bias:
        logits = biased(logits, sampling.logit_bias)
    if sampling.repetition_penalty != 1.0:
        logits = penalised(logits, previous, sampling.repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        seen, counts = np.unique(np.asarray(previous[prompt_tokens:], np.int64), return_counts=True)
        logits = logits.copy()
        logits[seen] -= (sampling.presence_penalty + sampling.frequency_penalty * counts).astype(np.float32)
    return logits


def biased(logits: F32, bias: Mapping[int, float]) -> F32:
    """A copy of `logits: f32[vocab]` with biases added. UsageError: an id outside the vocabulary."""
    ids = np.fromiter(bias, np.int64, len(bias))
    _require("logit_bias", ids, ids.min() >= 0 and ids.max() < len(logits), f"token ids in 0 .. {len(logits) - 1}")
    logits = logits.copy()
    logits[ids] += np.fromiter(bias.values(), np.float32, len(bias))
    return logits


def penalised(logits: F32, previous: Sequence[int], penalty: float) -> F32:
    """A copy of `logits: f32[vocab]` in which tokens that occurred have theirs divided by `penalty`, or multiplied if
    negative.
    """
    seen = np.unique(np.asarray(previous, np.int64))
    scores = logits[seen]
    logits = logits.copy()
    logits[seen] = np.where(scores > 0, scores / penalty, scores * penalty)
    return logits


def log_probabilities(logits: F32) -> F64:
    """The model's own log-probabilities, before any option: f64[vocab]."""
    shifted = logits.astype(np.float64) - float(logits.max())
    found: F64 = shifted - np.log(np.exp(shifted).sum())
    return found


def candidates(logits: F32, sampling: Sampling) -> tuple[I64, F64]:
    """The candidate tokens and their probabilities, most likely first if an option had to sort them.

    logits: f32[vocab]; temperature > 0. Returns ids: i64[n], probabilities: f64[n] that sum to 1.
    """
    ids = np.arange(logits.shape[0])
    if sampling.top_k is not None and sampling.top_k < logits.shape[0]:
        ids = _largest(logits, sampling.top_k)
    weights = _softmax(logits[ids], sampling.temperature)
    if sampling.top_p is not None and sampling.top_p < 1:
        kept = _nucleus(weights, sampling.top_p)
        ids, weights = ids[kept], weights[kept]
    if sampling.min_p:
        kept = np.flatnonzero(weights >= sampling.min_p * weights.max())
        ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()


def choose(probabilities: F64, point: float) -> int:
    """The index whose share of [0, 1) contains `point` (the inverse of the cumulative distribution)."""
    cumulative = np.cumsum(probabilities)
    return int(min(np.searchsorted(cumulative, point * cumulative[-1], side="right"), len(cumulative) - 1))


def uniform(seed: int, position: int) -> float:
    """Draw number `position` of stream `seed`, in [0, 1): Philox (Salmon et al. 2011), one counter per position."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _softmax(logits: F32, temperature: float) -> F64:
    with np.errstate(over="ignore"):  # a tiny temperature leaves the largest logit alone
        scaled = (logits.astype(np.float64) - float(logits.max())) / temperature
    weights: F64 = np.exp(scaled)
    return weights / weights.sum()


def _largest(values: F32 | F64, n: int) -> I64:
    """Indices of the n largest values, largest first, ties by index (as in a stable sort of all)."""
    if n < values.shape[0]:
        threshold = np.partition(values, -n)[-n]
        among = np.flatnonzero(values >= threshold)
    else:
        among = np.arange(values.shape[0])
    order = np.argsort(-values[among], kind="stable")[:n]
    return among[order]


def _nucleus(probabilities: F64, top_p: float) -> I64:
    """Indices of the smallest set of most likely tokens that together hold at least top_p, most likely first."""
    n = _FIRST_CUT
    while True:
        order = _largest(probabilities, n)
        enough = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
        if enough <= len(order) or n >= len(probabilities):
            return order[:enough]
        n *= 8


def _number(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _moderate(value: Any) -> bool:
    return _number(value) and abs(value) <= _MOST


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name}: expected {expected}, got {value}")
