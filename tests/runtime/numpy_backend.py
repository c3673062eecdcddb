"""A llama-family forward pass in plain numpy f32, one line an equation: the oracle that shares no code with the
runtime.

Equations as in transformers' modeling_llama.py: RMSNorm, rope on half-split pairs, grouped-query attention, SwiGLU.
"""

import numpy as np


class NumpyCache:
    """Keys and values of all positions so far: per layer, f32[tokens, kv_heads, head_dim]."""

    def __init__(self, layers):
        self.keys, self.values = [None] * layers, [None] * layers

    @property
    def length(self):
        return 0 if self.keys[0] is None else len(self.keys[0])

    def truncate(self, tokens):
        assert 0 <= tokens <= self.length
        for store in (self.keys, self.values):
            store[:] = [None if item is None else item[:tokens] for item in store]

    def extend(self, layer, keys, values):
        for store, new in ((self.keys, keys), (self.values, values)):
            store[layer] = new if store[layer] is None else np.concatenate([store[layer], new])
        return self.keys[layer], self.values[layer]


class NumpyBackend:
    """The Backend protocol over a dict of canonical names -> f32 arrays."""

    def __init__(self, config, weights):
        self.config, self._weights = config, weights

    def new_cache(self, tokens):
        return NumpyCache(self.config.layers)

    def forward(self, tokens, cache, last_only):
        config, weights = self.config, self._weights
        positions = cache.length + np.arange(len(tokens))
        x = weights["model.embed_tokens.weight"][tokens]
        for layer in range(config.layers):
            name = f"model.layers.{layer}."
            h = rms_norm(x, weights[name + "input_layernorm.weight"], config.norm_epsilon)
            x = x + self._attention(name + "self_attn.", layer, h, positions, cache)
            h = rms_norm(x, weights[name + "post_attention_layernorm.weight"], config.norm_epsilon)
            gate, up = (h @ weights[f"{name}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[name + "mlp.down_proj.weight"].T
        x = rms_norm(x[-1:] if last_only else x, weights["model.norm.weight"], config.norm_epsilon)
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        return x @ head.T

    def _attention(self, name, layer, h, positions, cache):
        config = self.config
        q = rope(self._project(name + "q", h, config.heads), positions, config)
        k = rope(self._project(name + "k", h, config.kv_heads), positions, config)
        keys, values = cache.extend(layer, k, self._project(name + "v", h, config.kv_heads))
        groups = config.heads // config.kv_heads
        keys, values = (np.repeat(item, groups, axis=1) for item in (keys, values))
        scores = np.einsum("qhd,khd->hqk", q, keys) / np.float32(np.sqrt(config.head_dim))
        later = np.arange(len(keys))[None, :] > positions[:, None]
        scores = np.where(later, -np.inf, scores)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", scores, values).reshape(len(h), -1)
        return mixed @ self._weights[name + "o_proj.weight"].T

    def _project(self, name, h, heads):
        out = h @ self._weights[f"{name}_proj.weight"].T
        if f"{name}_proj.bias" in self._weights:
            out = out + self._weights[f"{name}_proj.bias"]
        out = out.reshape(len(h), heads, self.config.head_dim)
        if f"{name}_norm.weight" in self._weights:
            out = rms_norm(out, self._weights[f"{name}_norm.weight"], self.config.norm_epsilon)
        return out


def rms_norm(x, weight, epsilon):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(epsilon)) * weight


def rope(x, positions, config):
    """Rotate x: f32[tokens, heads, head_dim]; pairs are (i, i + head_dim / 2)."""
    half = config.head_dim // 2
    angles = np.outer(positions, frequencies(config))
    cos, sin = (f(angles).astype(np.float32)[:, None, :] for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def frequencies(config):
    """f64[head_dim / 2], stretched as `rope_scaling` says."""
    plain = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.type == "linear":
        return plain / scaling.factor
    turns = scaling.original_context * plain / (2 * np.pi)  # llama3: turns within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return blend * plain + (1 - blend) * plain / scaling.factor
