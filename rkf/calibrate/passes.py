"""Calibration: the text a model writes by itself, and the second moments of every matrix' inputs on a text.

Gets the weights through a callable, so that a checkpoint needs no conversion first. Knows no file and no clustering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from rkf.calibrate.layers import SHARED_INPUTS, KeyValues, Layer, rms_norm
from rkf.calibrate.narrow import Narrow, product
from rkf.format.codec import workers
from rkf.model.first_form import ModelConfig

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U32 = NDArray[np.uint32]
Read = Callable[[str], "F32 | None"]
"""A tensor's weights by canonical name; None for one that the model has not."""

# What one thread works on: fixed, so that sums do not depend on the number of threads. A chunk that writes reads all
# weights for one token of each of its sequences: products reach 30 GFLOPS a core with 16 of them, 80 with 64, 100 with
# 128. A chunk that reads holds the activations of so many tokens.
_WRITTEN_SEQUENCES, _READ_TOKENS = 64, 1024
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def write_text(
    config: ModelConfig,
    read: Read,
    prompts: Sequence[Sequence[int]],
    *,
    ctx: int,
    seed: int = 0,
    keep: Callable[[F32], Narrow] = Narrow.of,
    progress: Callable[[int, int], None] | None = None,
) -> U32:
    """What the model writes after each prompt at temperature 1, u32[prompts, ctx], prompts included.

    Token t of sequence i is drawn by number i of Philox stream `seed` at counter t. What is held: the matrices, each as
    `keep` returns it, and the keys and values of all texts and layers in 16 bits.
    """
    layers = [Layer(config, _kept(layer_weights(config, read, number), keep)) for number in range(config.layers)]
    embedding, untied, norm = keep(required(read, EMBEDDING)), read(HEAD), required(read, NORM)
    head = embedding if untied is None else keep(untied)
    chunks = [
        range(start, min(start + _WRITTEN_SEQUENCES, len(prompts)))
        for start in range(0, len(prompts), _WRITTEN_SEQUENCES)
    ]
    pasts = [KeyValues.of_layers(config, len(chunk), ctx) for chunk in chunks]
    tokens = np.zeros((len(prompts), ctx), np.uint32)
    given = np.zeros((len(prompts), ctx), np.bool_)
    for number, prompt in enumerate(prompts):
        kept = list(prompt)[:ctx]
        tokens[number, : len(kept)], given[number, : len(kept)] = kept, True

    def step(chunk: range, past: list[KeyValues], position: int) -> None:
        rows = slice(chunk.start, chunk.stop)
        points = np.random.Generator(np.random.Philox(key=seed, counter=position)).random(size=len(prompts))
        x = embedding[tokens[rows, position - 1]][:, None]
        for layer, cache in zip(layers, past, strict=True):
            x = layer(x, cache)
        drawn = _drawn(product(rms_norm(x[:, 0], norm, config.norm_epsilon), head), points[rows])
        tokens[rows, position] = np.where(given[rows, position], tokens[rows, position], drawn)

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers()) as pool:
        for position in range(1, ctx):
            list(pool.map(step, chunks, pasts, repeat(position)))
            if progress is not None:
                progress(position + 1, ctx)
    return tokens


def moments(config: ModelConfig, read: Read, tokens: U32) -> Iterator[Mapping[str, F64]]:
    """Second moments E[x^T x] of the inputs of each layer's matrices, by canonical name, one layer after the other; at
    the end those of the output head. f64[cols, cols]; matrices that read the same input share one array.

    tokens: u32[sequences, ctx]. One layer's weights and moments are held at a time, and the residual stream.
    """
    embedding = required(read, EMBEDDING)
    together = max(1, _READ_TOKENS // tokens.shape[1])
    chunks = [tokens[start : start + together] for start in range(0, len(tokens), together)]
    states = [embedding[chunk] for chunk in chunks]
    del embedding
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers()) as pool:
        for number in range(config.layers):
            states, found = tapped(pool, Layer(config, layer_weights(config, read, number)), states)
            yield {f"model.layers.{number}.{name}": each for name, each in found.items()}
    norm = required(read, NORM)
    total = np.zeros((config.hidden_size, config.hidden_size))
    for x in states:
        normed = rms_norm(x, norm, config.norm_epsilon).reshape(-1, config.hidden_size)
        total += normed.T @ normed
    yield {HEAD: total / tokens.size}


def tapped(pool: ThreadPoolExecutor, layer: Layer, states: Sequence[F32]) -> tuple[list[F32], dict[str, F64]]:
    """What a layer makes of each chunk of states, f32[sequences, tokens, hidden], and the second moments of its
    matrices' inputs over all, by name within the layer.
    """
    count = sum(chunk.shape[0] * chunk.shape[1] for chunk in states)
    after: list[F32] = []
    means: dict[str, F64] = {}
    for x, squares in pool.map(partial(_seen, layer), states):  # added as they come: of all chunks they would be many
        after.append(x)
        for name, each in squares.items():
            means[name] = means.get(name, 0) + each / np.float64(count)
    return after, {f"{name}.weight": means[names[0]] for names in SHARED_INPUTS for name in names}


def _seen(layer: Layer, x: F32) -> tuple[F32, dict[str, F32]]:
    """What the layer makes of one chunk, and x^T x of its matrices' inputs, by the first name that shares an input."""
    own = {}

    def tap(name: str, values: F32) -> None:
        flat = values.reshape(-1, values.shape[-1])
        own[name] = flat.T @ flat

    return layer(x, None, tap), own


def _drawn(logits: F32, points: F64) -> NDArray[np.int64]:
    """The token whose share of [0, 1) holds each row's point. logits: f32[rows, vocab]; points: f64[rows]."""
    found = []
    for row, point in zip(logits, points, strict=True):  # one by one: all at once would take four times the logits
        cumulative = np.cumsum(np.exp(row - row.max()), dtype=np.float64)
        found.append(np.searchsorted(cumulative, point * cumulative[-1], side="right"))
    return np.minimum(found, logits.shape[1] - 1)


def _kept(weights: dict[str, F32], keep: Callable[[F32], Narrow]) -> dict[str, F32 | Narrow]:
    return {name: keep(each) if each.ndim > 1 else each for name, each in weights.items()}


def layer_weights(config: ModelConfig, read: Read, number: int) -> dict[str, F32]:
    """One layer's tensors by name within the layer."""
    prefix = f"model.layers.{number}."
    names = [name for name, _, _ in config.tensors() if name.startswith(prefix)]
    found = {name.removeprefix(prefix): read(name) for name in names}
    return {name: weights for name, weights in found.items() if weights is not None}


def required(read: Read, name: str) -> F32:
    weights = read(name)
    if weights is None:
        raise KeyError(name)
    return weights
