"""A dense model on batches of token sequences, layer by layer, in numpy f32: for calibration. Knows no file, no text.

What the CPU backend does for one sequence with all layers in memory, this does for many with one layer in memory, and
lets the inputs of every matrix be seen. The bytes do not depend on the number of threads as long as BLAS has one
thread a call (`threadpoolctl`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from rkf.calibrate.narrow import Narrow, product
from rkf.format.matrix import from_f32, to_f32
from rkf.model.first_form import ModelConfig
from rkf.model.rope import frequencies

F32 = NDArray[np.float32]
Tap = Callable[[str, F32], None]
"""Is told the input of each matrix: its name within the layer ("mlp.down_proj"), f32[tokens, cols]."""

# Matrices that read the same input: the first of each row stands for all.
SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


_SCORES = 1 << 21  # of attention held at once, unless one sequence has more: they grow with the square of its tokens


class KeyValues:
    """Keys and values of a batch so far, one layer, rounded to bf16: u16[batch, kv_heads, capacity, head_dim] each."""

    def __init__(self, kept: NDArray[np.uint16]) -> None:
        self._keys, self._values = kept
        self.length = 0

    @classmethod
    def of_layers(cls, config: ModelConfig, batch: int, capacity: int) -> list[KeyValues]:
        """One for each layer, in one piece of memory, which the system gets back as a whole."""
        shape = (config.layers, 2, batch, config.kv_heads, capacity, config.head_dim)
        return [cls(layer) for layer in np.zeros(shape, np.uint16)]

    def extend(self, keys: F32, values: F32) -> tuple[F32, F32]:
        """All keys and values with these appended, f32[batch, kv_heads, length, head_dim]."""
        end = self.length + keys.shape[2]
        for kept, new in ((self._keys, keys), (self._values, values)):
            kept[:, :, self.length : end] = from_f32(new, "bf16")
        self.length = end
        return to_f32(self._keys[:, :, :end], "bf16"), to_f32(self._values[:, :, :end], "bf16")


class Layer:
    """One decoder layer. weights: name within the layer ("mlp.down_proj.weight") -> f32, or Narrow; norms included."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, F32 | Narrow]) -> None:
        self._config = config
        self._matrices = {name: each for name, each in weights.items() if isinstance(each, Narrow) or each.ndim > 1}
        self._vectors = {name: each for name, each in weights.items() if not isinstance(each, Narrow)}

    def __call__(self, x: F32, past: KeyValues | None = None, tap: Tap | None = None) -> F32:
        """x: f32[batch, tokens, hidden], at the positions after those of `past`; returns the same shape."""
        see = tap or (lambda name, values: None)
        h = rms_norm(x, self._vectors["input_layernorm.weight"], self._config.norm_epsilon)
        see("self_attn.q_proj", h)
        mixed = self._attend(h, past)
        see("self_attn.o_proj", mixed)
        x = x + self._linear("self_attn.o_proj", mixed)
        h = rms_norm(x, self._vectors["post_attention_layernorm.weight"], self._config.norm_epsilon)
        see("mlp.gate_proj", h)
        gate = self._linear("mlp.gate_proj", h)
        inner = gate / (1 + np.exp(np.minimum(-gate, 80))) * self._linear("mlp.up_proj", h)
        see("mlp.down_proj", inner)
        return x + self._linear("mlp.down_proj", inner)

    def _linear(self, name: str, x: F32) -> F32:
        out = product(x.reshape(-1, x.shape[-1]), self._matrices[f"{name}.weight"]).reshape(*x.shape[:-1], -1)
        bias = self._vectors.get(f"{name}.bias")
        return out if bias is None else out + bias

    def _heads(self, part: str, h: F32, heads: int) -> F32:
        """f32[batch, heads, tokens, head_dim]"""
        out = self._linear(f"self_attn.{part}_proj", h).reshape(*h.shape[:2], heads, self._config.head_dim)
        norm = self._vectors.get(f"self_attn.{part}_norm.weight")
        if norm is not None:
            out = rms_norm(out, norm, self._config.norm_epsilon)
        return out.transpose(0, 2, 1, 3)

    def _attend(self, h: F32, past: KeyValues | None) -> F32:
        config = self._config
        positions = (past.length if past else 0) + np.arange(h.shape[1])
        q, k, v = (
            self._heads(part, h, heads)
            for part, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads))
        )
        turn = rotation(config, positions)
        q, k = rotated(q, turn), rotated(k, turn)
        if past is not None:
            k, v = past.extend(k, v)
        bias = np.where(_hidden(positions, k.shape[2], config.sliding_window), np.float32(-np.inf), np.float32(0))
        mixed = np.empty((len(h), config.heads, h.shape[1], config.head_dim), np.float32)
        together = max(1, _SCORES // (config.heads * bias.size))
        for start in range(0, len(h), together):
            part = slice(start, start + together)
            mixed[part] = _mixed(q[part] * np.float32(config.head_dim**-0.5), k[part], v[part], bias)
        return mixed.transpose(0, 2, 1, 3).reshape(*h.shape[:2], -1)


def _mixed(queries: F32, keys: F32, values: F32, bias: F32) -> F32:
    """Values mixed by softmax(queries keys^T + bias), f32[batch, heads, tokens, head_dim].

    queries: f32[batch, heads, tokens, head_dim]; keys, values: f32[batch, kv_heads, keys, head_dim]; bias: f32[tokens,
    keys].
    """
    grouped = queries.reshape(*keys.shape[:2], -1, keys.shape[3])  # the heads that share keys, one below the other
    scores: F32 = grouped @ keys.swapaxes(2, 3)
    scores.reshape(*queries.shape[:3], -1)[...] += bias
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    mixed: F32 = (scores @ values).reshape(queries.shape)
    return mixed


def rms_norm(x: F32, weight: F32, epsilon: float) -> F32:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis."""
    scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(epsilon))
    normed: F32 = x / scale * weight
    return normed


def rotation(config: ModelConfig, positions: NDArray[np.int64]) -> tuple[F32, F32]:
    """Cosines and sines, f32[tokens, head_dim / 2] each."""
    angles = positions[:, None].astype(np.float32) * frequencies(config)
    return np.cos(angles), np.sin(angles)


def rotated(x: F32, turn: tuple[F32, F32]) -> F32:
    """x: f32[…, tokens, head_dim] with the pairs (i, i + head_dim / 2) turned."""
    cos, sin = turn
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _hidden(positions: NDArray[np.int64], keys: int, window: int | None) -> NDArray[np.bool_]:
    """Which keys each token may not see, bool[tokens, keys]: later ones, and those before a sliding window."""
    distance = positions[:, None] - np.arange(keys)
    return (distance < 0) | (distance >= (window or keys + 1))
