"""A model of some hundred weights and its logits in f64, from spec/metadata.md alone, for checking a runtime.

It uses every feature: two layers, grouped heads, biases, norms of q and k, a sliding window, llama3 rope.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from golden import Golden, clustered, dense
from numpy.typing import NDArray

from rkf.format.matrix import Alias

F64 = NDArray[np.float64]

TOKENS = [1, 7, 3, 14, 15, 9, 2, 6, 5, 3]
MODEL: dict[str, Any] = {
    "add_bos": True,
    "architecture": "qwen3",
    "bos_id": 1,
    "context_length": 64,
    "eos_ids": [2],
    "generation": {"temperature": 0.5},
    "head_dim": 4,
    "heads": 4,
    "hidden_size": 12,
    "intermediate_size": 20,
    "kv_heads": 2,
    "layers": 2,
    "norm_epsilon": 1e-5,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_context": 100,
        "type": "llama3",
    },
    "rope_theta": 10000.0,
    "sliding_window": 6,
    "vocab_size": 16,
}
BLOBS = {
    "chat_template.jinja": b"{% for message in messages %}{{ message['content'] }}{% endfor %}",
    "tokenizer.json": json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "WordLevel", "vocab": {f"t{n}": n for n in range(16)}, "unk_token": "t0"},
            "pre_tokenizer": {"type": "Whitespace"},
        }
    ).encode(),
}


def tensors() -> dict[str, Golden]:
    """Every tensor of the model; widths, factors and exceptions differ from matrix to matrix."""
    sizes = {
        "q": (16, 12),
        "k": (8, 12),
        "v": (8, 12),
        "o": (12, 16),
        "gate": (20, 12),
        "up": (20, 12),
        "down": (12, 20),
    }
    embedding = clustered("embedding", (16, 12), 64, affine=("row", None, "f32", None), exceptions=(3, "bf16"))
    made = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": Golden(Alias("model.embed_tokens.weight"), embedding.weights),
        "model.norm.weight": dense("final norm", (12,), "f32"),
    }
    for layer in range(MODEL["layers"]):
        prefix = f"model.layers.{layer}."
        for short, shape in sizes.items():
            name = f"{prefix}{'mlp' if short in ('gate', 'up', 'down') else 'self_attn'}.{short}_proj"
            how = {"exceptions": (2, "f16")} if short == "down" else {"affine": ("tensor", None, "f32", "f16")}
            made[f"{name}.weight"] = clustered(name, shape, 16 if layer else 32, **how)
            if short in "qkv":
                made[f"{name}.bias"] = dense(f"{name} bias", shape[:1], "bf16")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{prefix}{norm}.weight"] = dense(f"{prefix}{norm}", (12,), "bf16")
        for norm in ("q_norm", "k_norm"):
            made[f"{prefix}self_attn.{norm}.weight"] = dense(f"{prefix}{norm}", (4,), "f16")
    return made


def logits(model: Mapping[str, Golden], tokens: list[int]) -> F64:
    """The forward pass of spec/metadata.md, section 3: `f64[tokens, vocabulary]`."""
    w = {name: golden.weights.astype(np.float64) for name, golden in model.items()}
    hidden = w["model.embed_tokens.weight"][tokens]
    for layer in range(MODEL["layers"]):
        prefix = f"model.layers.{layer}."
        hidden = hidden + attention(w, prefix, norm(hidden, w[f"{prefix}input_layernorm.weight"]))
        x = norm(hidden, w[f"{prefix}post_attention_layernorm.weight"])
        gate = x @ w[f"{prefix}mlp.gate_proj.weight"].T
        up = x @ w[f"{prefix}mlp.up_proj.weight"].T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ w[f"{prefix}mlp.down_proj.weight"].T
    return norm(hidden, w["model.norm.weight"]) @ w["lm_head.weight"].T


def attention(w: Mapping[str, F64], prefix: str, x: F64) -> F64:
    """`f64[tokens, hidden]` of one layer's attention."""
    heads, kv_heads, size = MODEL["heads"], MODEL["kv_heads"], MODEL["head_dim"]
    q, k, v = (
        (x @ w[f"{prefix}self_attn.{n}_proj.weight"].T + w[f"{prefix}self_attn.{n}_proj.bias"]).reshape(
            len(x), -1, size
        )
        for n in "qkv"
    )
    q = rope(norm(q, w[f"{prefix}self_attn.q_norm.weight"]))
    k = rope(norm(k, w[f"{prefix}self_attn.k_norm.weight"]))
    out = np.zeros((len(x), heads, size))
    for position in range(len(x)):
        first = max(0, position + 1 - MODEL["sliding_window"])
        for head in range(heads):
            kv_head = head * kv_heads // heads
            scores = k[first : position + 1, kv_head] @ q[position, head] / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[position, head] = weights / weights.sum() @ v[first : position + 1, kv_head]
    return out.reshape(len(x), -1) @ w[f"{prefix}self_attn.o_proj.weight"].T


def norm(x: F64, weight: F64) -> F64:
    return weight * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + MODEL["norm_epsilon"])


def rope(x: F64) -> F64:
    """Section 4 for `f64[tokens, heads, head_dim]`, positions from 0."""
    half, scaling = MODEL["head_dim"] // 2, MODEL["rope_scaling"]
    turned = np.empty_like(x)
    for i in range(half):
        f = MODEL["rope_theta"] ** (-2 * i / MODEL["head_dim"])
        waves = scaling["original_context"] * f / (2 * math.pi)  # wavelengths in the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        share = min(max((waves - low) / (high - low), 0.0), 1.0)
        angle = np.arange(len(x))[:, None] * ((1 - share) * f / scaling["factor"] + share * f)
        turned[..., i] = x[..., i] * np.cos(angle) - x[..., i + half] * np.sin(angle)
        turned[..., i + half] = x[..., i + half] * np.cos(angle) + x[..., i] * np.sin(angle)
    return turned
