"""Variants of the families with recurrent states or convolutions."""

from __future__ import annotations

from typing import Any

from .common_keys import LINEAR, LLAMA3

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
# hidden_size is 64, so mixers are 128 wide.
_MAMBA: dict[str, Any] = {"num_heads": 8, "head_dim": 16, "state_size": 24, "chunk_size": 16}
_GRANITE4: dict[str, Any] = {
    "layer_types": ["mamba", "attention", "mamba"],
    "mamba_n_heads": 8,
    "mamba_d_state": 24,
    "mamba_chunk_size": 16,
    "shared_intermediate_size": 32,
}

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
    "mamba2": ("mamba2", _MAMBA | {"n_groups": 2, "layer_norm_epsilon": 1e-4, "tie_word_embeddings": True}),
    "mamba2-limits": (
        "mamba2",
        _MAMBA
        | {
            "num_heads": 24,
            "head_dim": 8,
            "expand": 3,
            "n_groups": 1,
            "conv_kernel": 3,
            "use_bias": True,
            "use_conv_bias": False,
            "time_step_limit": [0.5, 1.5],
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        _GRANITE4
        | {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.125,
            "residual_multiplier": 0.25,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoehybrid-dense": (
        "granitemoehybrid",
        _GRANITE4
        | {
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "rope_parameters": LLAMA3,
            "attention_bias": True,
            "mamba_n_groups": 4,
            "mamba_d_head": 16,
        },
    ),
    "granitemoehybrid-limits": (
        "granitemoehybrid",
        _GRANITE4
        | {
            "num_hidden_layers": 2,
            "layer_types": None,
            "num_local_experts": 0,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "time_step_limit": [0.0, 0.75],
        },
    ),
}
