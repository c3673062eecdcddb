"""What each matrix costs a model's predictions when it alone is stored coarsely: measured, on a few tokens.

Disturbed copies of the residual stream go through the layers side by side with the true one, so weights are read once.
Knows no clustering: the coarse matrices come from a callable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from rkf.calibrate.layers import Layer, rms_norm
from rkf.calibrate.passes import EMBEDDING, F32, F64, HEAD, NORM, U32, Read, layer_weights, required, tapped
from rkf.format.codec import workers
from rkf.model.first_form import ModelConfig

Coarse = Callable[[F32, "F64 | None"], F32]
"""Weights as they would be stored coarsely; given the second moments of their inputs, so as to suit those."""

_PIECE = 128  # tokens of a text that count as one
_SEEN = 40  # texts that give the moments of the inputs
_MEASURED = 3  # other texts, which copies are made of
_COPIED, _SCORED = 96, 48  # their last tokens: after little context the first layers seem to matter more than they do
_DRAWS = 16  # tokens drawn from each prediction
_ROWS = 4096  # rows of the embedding beyond those that are needed, so that its centroids are those of the whole
_TOGETHER = 4  # texts or disturbed copies that one thread works on


def losses(config: ModelConfig, read: Read, coarse: Coarse, tokens: U32) -> dict[str, float]:
    """Name of each matrix -> mean KL divergence in nats, by its second-order term, that storing it coarsely costs.

    tokens: u32[sequences, ctx]. Two predictions whose logits differ by d diverge by Var(d) / 2 under the first, where d
    is small; the variance is taken over tokens drawn from it, which spares the copies the output head. Few predictions
    would decide a mean: what is taken is the square of the mean root. One layer's weights are held at a time, the
    embedding and the head, and copies of _MEASURED * _COPIED states for each matrix.
    """
    piece = min(_PIECE, tokens.shape[1])
    tokens = tokens[:, : tokens.shape[1] // piece * piece].reshape(-1, piece)
    spread = np.linspace(0, len(tokens) - 1, _SEEN + _MEASURED).astype(int)
    of_measured = np.isin(np.arange(len(spread)), np.linspace(0, len(spread) - 1, _MEASURED).astype(int))
    seen_ids, ids = tokens[spread[~of_measured]], tokens[spread[of_measured], -_COPIED:]
    embedding, head = required(read, EMBEDDING), read(HEAD)
    x = embedding[ids]
    seen = np.array_split(embedding[seen_ids], _SEEN // _TOGETHER)
    names, copies = [EMBEDDING], _coarse_rows(embedding, ids, coarse, None)[None]
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers()) as pool:
        for number in range(config.layers):
            weights = layer_weights(config, read, number)
            layer = Layer(config, weights)
            moved = pool.map(partial(_through, layer), np.array_split(copies, -(-len(copies) // _TOGETHER)))
            seen, moments = tapped(pool, layer, seen)
            new = pool.map(partial(_disturbed, config, weights, coarse, x), moments, moments.values())
            copies = np.concatenate([*moved, *(each[None] for each in new)])
            names += [f"model.layers.{number}.{kind}" for kind in moments]
            x = layer(x)
    norm = required(read, NORM)
    before = rms_norm(x[:, -_SCORED:], norm, config.norm_epsilon).reshape(-1, config.hidden_size)
    after = rms_norm(copies[:, :, -_SCORED:], norm, config.norm_epsilon).reshape(len(copies), *before.shape)
    last = embedding if head is None else head
    drawn = _drawn(before @ last.T)
    found = {name: _divergence(each - before, last[drawn]) for name, each in zip(names, after, strict=True)}
    flat = rms_norm(np.concatenate(seen), norm, config.norm_epsilon).reshape(-1, config.hidden_size).astype(np.float64)
    of_head = _divergence(before, _coarse_rows(last, drawn, coarse, flat.T @ flat / len(flat)) - last[drawn])
    if head is None:
        found[EMBEDDING] += of_head
    else:
        found[HEAD] = of_head
    return found


def _through(layer: Layer, copies: F32) -> F32:
    """copies: f32[copies, texts, tokens, hidden]"""
    return layer(copies.reshape(-1, *copies.shape[2:])).reshape(copies.shape)


def _disturbed(config: ModelConfig, weights: Mapping[str, F32], coarse: Coarse, x: F32, kind: str, moments: F64) -> F32:
    return Layer(config, {**weights, kind: coarse(weights[kind], moments)})(x)


def _coarse_rows(weights: F32, ids: NDArray[np.integer], coarse: Coarse, moments: F64 | None) -> F32:
    """Rows of a coarse embedding, f32[ids' shape, hidden]."""
    spread = np.linspace(0, len(weights) - 1, min(_ROWS, len(weights))).astype(int)
    rows = np.union1d(ids, spread)
    return coarse(weights[rows], moments)[np.searchsorted(rows, ids)]


def _divergence(states: F32, rows: F32) -> float:
    """From what changes the logits of drawn tokens. states: f32[predictions, hidden]; rows: f32[predictions, draws,
    hidden].
    """
    changes = np.einsum("nh,ndh->nd", states, rows, dtype=np.float64)
    return float(changes.std(axis=1, ddof=1).mean() ** 2 / 2)


def _drawn(logits: F32) -> NDArray[np.int64]:
    """Tokens drawn from each prediction, i64[predictions, _DRAWS]."""
    random = np.random.Generator(np.random.Philox(key=0))
    shares = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64)).cumsum(axis=1)
    points = random.random((len(logits), _DRAWS)) * shares[:, -1:]
    found = [np.searchsorted(row, each, side="right") for row, each in zip(shares, points, strict=True)]
    return np.minimum(found, logits.shape[1] - 1)
