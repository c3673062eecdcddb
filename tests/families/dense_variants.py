"""Variants of the dense decoders; Gemma has a file of its own."""

from __future__ import annotations

from typing import Any

from .common_keys import DYNAMIC, LINEAR, LLAMA3, ORIGINAL, WINDOW, YARN, longrope

_MINISTRAL = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 32,
            "rope_parameters": LINEAR,
            "rms_norm_eps": 1e-4,
        },
    ),
    "llama-gelu": ("llama", {"hidden_act": "gelu", "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral-yarn": ("mistral", {"sliding_window": None, "head_dim": 32, "rope_parameters": YARN}),
    "ministral": (
        "ministral",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "ministral-window": ("ministral", {"head_dim": 32, "sliding_window": WINDOW, "tie_word_embeddings": True}),
    "qwen2": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-dynamic": ("qwen2", {"rope_parameters": DYNAMIC, "sliding_window": WINDOW}),
    "qwen3": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "head_dim": 32,
        },
    ),
    "qwen3-plain": ("qwen3", {"head_dim": 32, "use_sliding_window": False, "sliding_window": WINDOW}),
    "qwen3-biases": (
        "qwen3",
        {
            "attention_bias": True,
            "head_dim": 32,
            "rope_parameters": YARN | {"truncate": False, "attention_factor": 1.25, "beta_fast": 8.0},
        },
    ),
    "phi3": (
        "phi3",
        {
            "rope_parameters": longrope(6, 0.75),
            "original_max_position_embeddings": ORIGINAL,
            "num_key_value_heads": 4,
        },
    ),
    "phi3-short": (
        "phi3",
        {
            "rope_parameters": longrope(8, 1.0),
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 1024,
            "eos_token_id": [2, 0],
        },
    ),
    "phi3-window": ("phi3", {"sliding_window": WINDOW, "tie_word_embeddings": True, "head_dim": 32}),
    "olmo2": ("olmo2", {}),
    "olmo2-biases": (
        "olmo2",
        {
            "attention_bias": True,
            "num_key_value_heads": 1,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": True,
            "hidden_act": "relu",
        },
    ),
    "ministral3": ("ministral3", {"head_dim": 32, "rope_parameters": _MINISTRAL, "tie_word_embeddings": True}),
    "ministral3-window": (
        "ministral3",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "rope_parameters": _MINISTRAL | {"mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.25, "beta_fast": 4.0},
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "head_dim": 32}),
    "smollm3-window": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "no_rope_layer_interval": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": YARN,
            "tie_word_embeddings": False,
        },
    ),
    "olmo3": (
        "olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "olmo3-biases": (
        "olmo3",
        {
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.125,
            "residual_multiplier": 0.25,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite-biases": (
        "granite",
        {
            "attention_multiplier": 0.3,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 32,
            "rope_parameters": LLAMA3,
        },
    ),
    "glm4": ("glm4", {"head_dim": 32}),
    "glm4-no-biases": (
        "glm4",
        {
            "head_dim": 16,
            "attention_bias": False,
            "rope_parameters": LINEAR | {"partial_rotary_factor": 0.25},
            "tie_word_embeddings": True,
        },
    ),
    "exaone4": ("exaone4", {"num_hidden_layers": 4, "sliding_window": WINDOW, "tie_word_embeddings": True}),
    "exaone4-full": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3, "rope_parameters": LLAMA3},
    ),
    "cohere2": ("cohere2", {"num_hidden_layers": 4, "sliding_window": WINDOW, "logit_scale": 0.25}),
    "cohere2-biases": (
        "cohere2",
        {
            "sliding_window": WINDOW,
            "sliding_window_pattern": 2,
            "head_dim": 32,
            "attention_bias": True,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": False,
        },
    ),
    "seed_oss": ("seed_oss", {"head_dim": 32}),
    "seed_oss-biases": (
        "seed_oss",
        {
            "head_dim": None,
            "attention_bias": False,
            "attention_out_bias": True,
            "mlp_bias": True,
            "rope_parameters": YARN,
            "tie_word_embeddings": True,
        },
    ),
    "ernie4_5": ("ernie4_5", {"head_dim": 32}),
    "ernie4_5-biases": (
        "ernie4_5",
        {"head_dim": None, "use_bias": True, "rope_parameters": LINEAR, "tie_word_embeddings": False},
    ),
    "starcoder2": ("starcoder2", {"norm_epsilon": 1e-4}),
    "starcoder2-window": (
        "starcoder2",
        {"use_bias": False, "sliding_window": WINDOW, "tie_word_embeddings": False, "hidden_act": "gelu"},
    ),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "layer_norm_eps": 1e-4}),
    "stablelm-norms": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "stablelm-parallel": (
        "stablelm",
        {
            "use_parallel_residual": True,
            "rope_parameters": LINEAR | {"partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    ),
    "nemotron": ("nemotron", {}),
    "nemotron-biases": (
        "nemotron",
        {
            "head_dim": 32,
            "attention_bias": True,
            "mlp_bias": True,
            "norm_eps": 1e-4,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.25},
        },
    ),
    "gpt_neox": ("gpt_neox", {"layer_norm_eps": 1e-4}),
    "gpt_neox-in-turn": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "relu",
            "rope_parameters": LINEAR | {"partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    ),
    "apertus": ("apertus", {"head_dim": 32, "rope_parameters": LLAMA3}),
    "apertus-relu": (
        "apertus",
        {
            "hidden_act": "relu2",
            "attention_bias": True,
            "num_key_value_heads": None,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": True,
        },
    ),
    "arcee": ("arcee", {"head_dim": 32, "rope_parameters": YARN}),
    "arcee-biases": (
        "arcee",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": None,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": True,
        },
    ),
}
