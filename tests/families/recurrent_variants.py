"""Variants of the families with recurrent states or convolutions."""

from __future__ import annotations

from typing import Any

from .common_keys import LINEAR

_DELTA: dict[str, Any] = {
    "head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MIXTURE: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
_CONV: dict[str, Any] = {"layer_types": ["conv", "full_attention", "conv"]}

RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("qwen3_5_text", _DELTA | {"num_hidden_layers": 4}),
    "qwen3_5-mixed": (
        "qwen3_5_text",
        _DELTA
        | {
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "linear_num_value_heads": 2,
            "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 3,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_5_moe": ("qwen3_5_moe_text", _DELTA | _MIXTURE | {"num_hidden_layers": 4}),
    "qwen3_5_moe-tied": (
        "qwen3_5_moe_text",
        _DELTA
        | _MIXTURE
        | {
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 4,
            "linear_value_head_dim": 16,
            "tie_word_embeddings": True,
        },
    ),
    "lfm2": ("lfm2", _CONV | {"block_multiple_of": 16}),
    "lfm2-biases": (
        "lfm2",
        {
            "full_attn_idxs": [0, 2],
            "conv_bias": True,
            "conv_L_cache": 4,
            "block_auto_adjust_ff_dim": False,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": False,
        },
    ),
    "lfm2_moe": (
        "lfm2_moe",
        _CONV | {"num_dense_layers": 1, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    ),
    "lfm2_moe-plain": (
        "lfm2_moe",
        _CONV
        | {
            "num_dense_layers": 0,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "use_expert_bias": False,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
    ),
}
