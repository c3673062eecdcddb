"""Models of some hundred weights and their logits in f64, from spec/metadata.md alone, for checking a runtime.

The first has two layers, grouped heads, biases of q, k and v, norms of q and k, a sliding window and llama3 rope. The
others have what it lacks: linear rope, a head of its own and every bias; and a frequency in llama3's middle band.
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
LINEAR: dict[str, Any] = {
    **{key: value for key, value in MODEL.items() if key not in ("sliding_window", "bos_id")},
    "add_bos": False,
    "architecture": "llama",
    "rope_scaling": {"factor": 4.0, "type": "linear"},
}
# Of its two frequencies one is in the middle band: 3.2 wavelengths in the original context.
BAND: dict[str, Any] = {
    **{key: value for key, value in MODEL.items() if key != "sliding_window"},
    "architecture": "mistral",
    "rope_scaling": {**MODEL["rope_scaling"], "original_context": 20},
}
MODELS = {"model-band.rkf": BAND, "model-linear.rkf": LINEAR, "model.rkf": MODEL}
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


def tensors(file: str) -> dict[str, Golden]:
    """Every tensor of a model; widths, factors and exceptions differ from matrix to matrix."""
    first, linear = file == "model.rkf", file == "model-linear.rkf"
    seed = "" if first else f"{file} "
    sizes = {
        "q": (16, 12),
        "k": (8, 12),
        "v": (8, 12),
        "o": (12, 16),
        "gate": (20, 12),
        "up": (20, 12),
        "down": (12, 20),
    }
    embedding = clustered(f"{seed}embedding", (16, 12), 64, affine=("row", None, "f32", None), exceptions=(3, "bf16"))
    made = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": Golden(Alias("model.embed_tokens.weight"), embedding.weights),
        "model.norm.weight": dense(f"{seed}final norm", (12,), "f32"),
    }
    if linear:
        made["lm_head.weight"] = clustered(f"{seed}head", (16, 12), 32)
    for layer in range(MODELS[file]["layers"]):
        prefix = f"model.layers.{layer}."
        for short, shape in sizes.items():
            name = f"{prefix}{'mlp' if short in ('gate', 'up', 'down') else 'self_attn'}.{short}_proj"
            how = {"exceptions": (2, "f16")} if short == "down" else {"affine": ("tensor", None, "f32", "f16")}
            made[f"{name}.weight"] = clustered(f"{seed}{name}", shape, 16 if layer else 32, **how)
            if linear or (first and short in "qkv"):
                made[f"{name}.bias"] = dense(f"{seed}{name} bias", shape[:1], "bf16")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{prefix}{norm}.weight"] = dense(f"{seed}{prefix}{norm}", (12,), "bf16")
        for norm in ("q_norm", "k_norm") if first else ():
            made[f"{prefix}self_attn.{norm}.weight"] = dense(f"{prefix}{norm}", (4,), "f16")
    return made


def logits(file: str, model: Mapping[str, Golden], tokens: list[int]) -> F64:
    """The forward pass of spec/metadata.md, section 3: `f64[tokens, vocabulary]`."""
    config = MODELS[file]
    w = {name: golden.weights.astype(np.float64) for name, golden in model.items()}
    hidden = w["model.embed_tokens.weight"][tokens]
    for layer in range(config["layers"]):
        prefix = f"model.layers.{layer}."
        hidden = hidden + attention(config, w, prefix, norm(config, hidden, w[f"{prefix}input_layernorm.weight"]))
        x = norm(config, hidden, w[f"{prefix}post_attention_layernorm.weight"])
        gate, up = linear(w, f"{prefix}mlp.gate_proj", x), linear(w, f"{prefix}mlp.up_proj", x)
        hidden = hidden + linear(w, f"{prefix}mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    return norm(config, hidden, w["model.norm.weight"]) @ w["lm_head.weight"].T


def attention(config: Mapping[str, Any], w: Mapping[str, F64], prefix: str, x: F64) -> F64:
    """`f64[tokens, hidden]` of one layer's attention."""
    heads, kv_heads, size = config["heads"], config["kv_heads"], config["head_dim"]
    q, k, v = (linear(w, f"{prefix}self_attn.{n}_proj", x).reshape(len(x), -1, size) for n in "qkv")
    if f"{prefix}self_attn.q_norm.weight" in w:
        q = norm(config, q, w[f"{prefix}self_attn.q_norm.weight"])
        k = norm(config, k, w[f"{prefix}self_attn.k_norm.weight"])
    q, k = rope(config, q), rope(config, k)
    out = np.zeros((len(x), heads, size))
    for position in range(len(x)):
        first = max(0, position + 1 - config.get("sliding_window", len(x)))
        for head in range(heads):
            kv_head = head * kv_heads // heads
            scores = k[first : position + 1, kv_head] @ q[position, head] / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[position, head] = weights / weights.sum() @ v[first : position + 1, kv_head]
    return linear(w, f"{prefix}self_attn.o_proj", out.reshape(len(x), -1))


def linear(w: Mapping[str, F64], name: str, x: F64) -> F64:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def norm(config: Mapping[str, Any], x: F64, weight: F64) -> F64:
    return weight * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config["norm_epsilon"])


def rope(config: Mapping[str, Any], x: F64) -> F64:
    """Section 4 for `f64[tokens, heads, head_dim]`, positions from 0."""
    half = config["head_dim"] // 2
    turned = np.empty_like(x)
    for i in range(half):
        f = stretched(config["rope_theta"] ** (-2 * i / config["head_dim"]), config["rope_scaling"])
        angle = np.arange(len(x))[:, None] * f
        turned[..., i] = x[..., i] * np.cos(angle) - x[..., i + half] * np.sin(angle)
        turned[..., i + half] = x[..., i + half] * np.cos(angle) + x[..., i] * np.sin(angle)
    return turned


def stretched(f: float, scaling: Mapping[str, Any]) -> float:
    if scaling["type"] == "linear":
        return f / float(scaling["factor"])
    waves = scaling["original_context"] * f / (2 * math.pi)  # wavelengths in the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = min(max((waves - low) / (high - low), 0.0), 1.0)
    return float((1 - share) * f / scaling["factor"] + share * f)
