"""Variants of the families with experts and without recurrent states."""

from __future__ import annotations

from typing import Any

from .common_keys import LINEAR, LLAMA3, WINDOW, YARN

_GROUPED: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_GROUPS: dict[str, Any] = _GROUPED | {
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.5,
    "tie_word_embeddings": True,
}

_LLAMA4: dict[str, Any] = {
    "num_hidden_layers": 4,
    "intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "head_dim": 32,
    "num_local_experts": 4,
}

_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "head_dim": 32,
        },
    ),
    "qwen3_moe-mixed": (
        "qwen3_moe",
        {
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "mlp_only_layers": [3],
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "mixtral-window": (
        "mixtral",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": WINDOW,
            "head_dim": 32,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "qwen2_moe-mixed": (
        "qwen2_moe",
        {
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 32,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "mlp_only_layers": [3],
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4}),
    "olmoe-clip": (
        "olmoe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "clip_qkv": 0.5,
            "norm_topk_prob": True,
            "attention_bias": True,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 32,
            "sliding_window": WINDOW,
            "rope_parameters": YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    ),
    "gpt_oss-clamped": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "attention_bias": False,
            "swiglu_limit": 0.5,
            "swiglu_alpha": 1.25,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoe": (
        "granitemoe",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.125,
            "residual_multiplier": 0.25,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoe-biases": (
        "granitemoe",
        {"num_local_experts": 4, "attention_multiplier": 0.3, "attention_bias": True, "rope_parameters": LLAMA3},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 32, "tie_word_embeddings": True},
    ),
    "ernie4_5_moe-mixed": (
        "ernie4_5_moe",
        {
            "num_hidden_layers": 4,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": 2,
            "moe_layer_interval": 2,
            "use_bias": True,
            "head_dim": 32,
            "tie_word_embeddings": False,
        },
    ),
    "glm4_moe": ("glm4_moe", _GROUPED | {"head_dim": 32, "attention_bias": True, "use_qk_norm": True}),
    "glm4_moe-groups": ("glm4_moe", _GROUPS | {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.25}}),
    "llama4": ("llama4_text", _LLAMA4 | {"interleave_moe_layer_step": 2, "rope_parameters": LLAMA3}),
    "llama4-chunks": (
        "llama4_text",
        _LLAMA4
        | {
            "num_experts_per_tok": 2,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0, 1, 1],
            "layer_types": ["chunked_attention", "full_attention", "full_attention", "chunked_attention"],
            "moe_layers": [0, 3],
            "floor_scale": 16,
            "attn_scale": 0.25,
            "use_qk_norm": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        _LATENT
        | _GROUPED
        | {
            "n_group": 4,
            "topk_group": 2,
            "q_lora_rank": 24,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v3-plain": (
        "deepseek_v3",
        _LATENT
        | _GROUPS
        | {
            "q_lora_rank": None,
            "rope_interleave": False,
            "attention_bias": True,
            "first_k_dense_replace": 0,
            "rms_norm_eps": 1e-5,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        },
    ),
    "glm4_moe_lite": ("glm4_moe_lite", _LATENT | _GROUPED | {"q_lora_rank": 24, "rms_norm_eps": 1e-6}),
    "glm4_moe_lite-mixed": (
        "glm4_moe_lite",
        _LATENT
        | _GROUPS
        | {
            "q_lora_rank": None,
            "rms_norm_eps": 1e-6,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "rope_parameters": LINEAR,
        },
    ),
}
