"""The Kullback-Leibler divergence of a model's predictions from a reference's. Knows no file format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from rkf.errors import UsageError
from rkf.eval.distributions import F32, F64, Sampled, Whole, log_softmax
from rkf.eval.perplexity import Progress, check_ctx, cut, exp_of_mean, scored_logits
from rkf.eval.reference import Window
from rkf.format.matrix import from_f32, to_f32

if TYPE_CHECKING:
    from rkf.runtime.model import Model


def windows_of(model: Model, text: str, *, ctx: int = 512, windows: int | None = None) -> Iterator[Window]:
    """A reference model's predictions on a text, one window at a time, with the windows of `rkf.eval.perplexity`.

    UsageError: the text is shorter than one window, ctx is out of range.
    """
    check_ctx(model, ctx)
    for part in cut(model.tokenizer.encode(text, enough=windows and windows * ctx, special=False), ctx, windows):
        ids = np.array(part, np.int64)
        yield described(ids, scored_logits(model, part))


def described(ids: np.ndarray, logits: F32) -> Window:
    """A window, from a reference's logits. ids: i64[ctx]; logits: f32[scored, vocab]."""
    whole = Whole(log_softmax(logits))
    in_16_bits = log_softmax(to_f32(from_f32(logits, "bf16"), "bf16"))
    return Window(ids, whole, _of_targets(whole.log_p, ids), float(whole.divergence(in_16_bits).mean()))


def sampled(window: Window, number: int) -> Window:
    """Window `number` of a text with its distributions reduced to the sample that a `.kld` file stores."""
    if not isinstance(window.distribution, Whole):
        return window
    try:
        return replace(window, distribution=Sampled.of(window.distribution, seed=number))
    except ValueError as error:
        raise UsageError(f"the reference cannot be stored: {error}") from error


def divergence(
    model: Model, reference: Iterable[Window], *, total: int = 0, progress: Progress | None = None
) -> dict[str, float]:
    """KL(reference || model) in nats over every scored token of a reference's windows.

    {"kld", "kld_stderr", "kld_median", "kld_p99", "kld_max", "top1" (share of positions where both have the same most
    likely token), "top1_stderr", "ppl", "ppl_reference", "ppl_ratio", "ppl_ratio_stderr", "noise_floor" (divergence
    from the reference to its own logits in bf16), "tokens"}. total: the number of windows, only for `progress`.
    UsageError: a window is longer than the model's context, or the reference has another vocabulary.
    """
    vocab = model.config.vocab_size
    scores = []
    noise = []
    for done, window in enumerate(reference, 1):
        if len(window.ids) > model.config.context_length:
            raise UsageError(f"a window of {len(window.ids)} tokens: expected {model.config.context_length} at most")
        if window.ids.max() >= vocab or not window.distribution.fits(vocab):
            raise UsageError(f"the reference has another vocabulary than the model's {vocab} tokens: choose another")
        log_q = log_softmax(scored_logits(model, window.ids))
        scores.append(score(window, log_q))
        noise.append(window.noise)
        if progress is not None:
            progress(done, total)
    return summary(np.concatenate(scores, axis=1), float(np.mean(noise)))


def score(window: Window, log_q: F32) -> F64:
    """f64[4, scored]: divergence, whether the most likely token agrees, -log p of the model and of the reference."""
    same = window.distribution.likeliest == log_q.argmax(axis=1)
    return np.stack([window.distribution.divergence(log_q), same, -_of_targets(log_q, window.ids), -window.target])


def summary(scores: F64, noise_floor: float) -> dict[str, float]:
    """The keys of `divergence` from scores: f64[4, tokens]."""
    kld, same, loss, reference = scores
    ratio = exp_of_mean(loss - reference)
    return {
        "kld": kld.mean(),
        "kld_stderr": _stderr(kld),
        "kld_median": float(np.median(kld)),
        "kld_p99": float(np.quantile(kld, 0.99)),
        "kld_max": kld.max(),
        "top1": same.mean(),
        "top1_stderr": _stderr(same),
        "ppl": exp_of_mean(loss),
        "ppl_reference": exp_of_mean(reference),
        "ppl_ratio": ratio,
        "ppl_ratio_stderr": ratio * _stderr(loss - reference),
        "noise_floor": noise_floor,
        "tokens": kld.size,
    }


def _stderr(values: F64) -> float:
    return sqrt(values.var() / (len(values) - 1)) if len(values) > 1 else 0.0


def _of_targets(log_p: F32, ids: Sequence[int] | np.ndarray) -> F32:
    """log_p of the actual tokens, f32[scored]."""
    targets = np.asarray(ids, np.int64)[len(ids) // 2 + 1 :]
    return np.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
