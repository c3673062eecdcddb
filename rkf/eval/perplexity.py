"""Perplexity of a model on a text by llama.cpp's protocol, so that figures are comparable. Knows no file format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, sqrt
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rkf.errors import SemanticsError, UsageError
from rkf.runtime.backend import Row

if TYPE_CHECKING:
    from rkf.runtime.model import Model

Progress = Callable[[int, int], None]  # (windows done, windows in all)


def perplexity(
    model: Model, text: str, *, ctx: int = 512, windows: int | None = None, progress: Progress | None = None
) -> dict[str, float]:
    """exp of the mean negative log-likelihood of the text's tokens: {"ppl", "ppl_stderr", "tokens"}.

    The text's tokens are cut into windows of `ctx` that do not overlap; the incomplete one at the end is dropped.
    Special tokens that the text spells are text, as for llama.cpp. `windows` limits the number of windows. In
    each, tokens ctx/2 + 1 .. ctx - 1 are scored, given all earlier tokens of the window. BOS replaces a window's first
    token if the model wants one. ppl_stderr: the standard error of the mean, times ppl. UsageError: the text is shorter
    than one window, or ctx is out of range.
    """
    check_ctx(model, ctx)
    parts = cut(model.tokenizer.encode(text, enough=windows and windows * ctx, special=False), ctx, windows)
    losses = []
    for done, part in enumerate(parts, 1):
        losses.append(window_losses(model, part))
        if progress is not None:
            progress(done, len(parts))
    return summary(np.concatenate(losses))


def check_ctx(model: Model, ctx: int) -> None:
    """Raise UsageError for a number of tokens that a window of the model's cannot have."""
    most = model.config.context_length
    if most < 4:
        raise UsageError(f"the model's context of {most} tokens is too short to measure: expected 4 or more")
    if not 4 <= ctx <= most:
        raise UsageError(f"ctx: expected 4 to {most}, got {ctx}")


def cut(ids: Sequence[int], ctx: int, windows: int | None) -> list[Sequence[int]]:
    """The first windows of `ctx` ids each."""
    available = len(ids) // ctx
    if available == 0 or (windows is not None and windows < 1):
        raise UsageError(f"the text has {len(ids)} tokens: expected at least one window of {ctx}")
    return [ids[i * ctx : (i + 1) * ctx] for i in range(min(available, windows or available))]


def window_losses(model: Model, ids: Sequence[int]) -> NDArray[np.float64]:
    """-log p of the second half of a window, `f64[ctx - ctx // 2 - 1]`."""
    return negative_log_likelihood(scored_logits(model, ids), np.asarray(ids[len(ids) // 2 + 1 :], np.int64))


def scored_logits(model: Model, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
    """The logits that predict each scored token of a window, `f32[ctx - ctx // 2 - 1, vocab]`."""
    tokens = np.array(ids, np.int64)
    if model.config.add_bos and model.config.bos_id is not None:
        tokens[0] = model.config.bos_id
    half = len(tokens) // 2
    row = Row(model.backend.new_sequence(len(tokens)), tokens[:-1])
    return finite(model.backend.forward([row], np.arange(half, len(tokens) - 1)))  # the first half is context alone


def finite(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logits; SemanticsError if one is NaN or infinite, so that no figure hides it."""
    if not np.isfinite(logits).all():
        raise SemanticsError("the model's logits are not finite; `rkf verify` checks the file")
    return logits


def exp_of_mean(losses: NDArray[np.float64]) -> float:
    """The perplexity of losses in nats; SemanticsError if it is beyond what a number holds."""
    try:
        return exp(losses.mean())
    except OverflowError:
        reason = f"the mean loss is {losses.mean():.4g} nats, too much for a perplexity"
        raise SemanticsError(f"{reason}; `rkf verify` checks the file") from None


def negative_log_likelihood(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log softmax(logits)[target] for each row. logits: f32[n, vocab]; targets: i64[n]; returns f64[n]."""
    highest = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - highest).sum(axis=1, dtype=np.float64)
    chosen = np.take_along_axis(logits, targets[:, None], axis=1) - highest
    losses: NDArray[np.float64] = np.log(total) - chosen[:, 0].astype(np.float64)
    return losses


def summary(losses: NDArray[np.float64]) -> dict[str, float]:
    """ppl, its standard error, and the number of scored tokens."""
    ppl = exp_of_mean(losses)
    stderr = sqrt(losses.var() / (len(losses) - 1)) if len(losses) > 1 else 0.0
    return {"ppl": ppl, "ppl_stderr": stderr * ppl, "tokens": len(losses)}
