"""Small random models of every family, two or more variants each, as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from tests.converters.conftest import VOCAB, write_tokenizer

WINDOW = 20
# 64 positions beyond any window, and past the original context of every stretched rope.
TOKENS = WINDOW + 64
ORIGINAL = 64

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}

_MINISTRAL = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}


def longrope(pairs: int, partial: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": partial,
        "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
        "long_factor": [2.0 + 0.3 * pair for pair in range(pairs)],
    }


# name -> model_type, keys beyond the common ones. Each option of a family is used by one variant at least.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
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
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3-softcap": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
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
}

VARIANTS |= {
    "ministral3": ("ministral3", {"head_dim": 32, "rope_parameters": _MINISTRAL, "tie_word_embeddings": True}),
    "ministral3-window": (
        "ministral3",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "rope_parameters": _MINISTRAL | {"mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.25, "beta_fast": 4.0},
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2-no-softcaps": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": False,
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
    "stablelm-parallel": (
        "stablelm",
        {
            "use_parallel_residual": True,
            "rope_parameters": LINEAR | {"partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    ),
    "nemotron": ("nemotron", {}),
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
}

VARIANTS |= {
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
            "head_dim": 32,
            "tie_word_embeddings": False,
        },
    ),
}

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
VARIANTS |= {
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
}

_CONV: dict[str, Any] = {"layer_types": ["conv", "full_attention", "conv"]}
VARIANTS |= {
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

_GEMMA4: dict[str, Any] = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
}
VARIANTS |= {
    "gemma4": (
        "gemma4_text",
        _GEMMA4
        | {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma4-keys-as-values": (
        "gemma4_text",
        _GEMMA4
        | {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
            "tie_word_embeddings": False,
        },
    ),
    "gemma4-biases": ("gemma4_text", _GEMMA4 | {"hidden_size_per_layer_input": 0, "attention_bias": True}),
    "gemma4-experts": (
        "gemma4_text",
        _GEMMA4
        | {
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 3,
            "moe_intermediate_size": 32,
        },
    ),
}

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
VARIANTS |= {
    "glm4_moe": ("glm4_moe", _GROUPED | {"head_dim": 32, "attention_bias": True, "use_qk_norm": True}),
    "glm4_moe-groups": ("glm4_moe", _GROUPS | {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.25}}),
}

_LLAMA4: dict[str, Any] = {
    "num_hidden_layers": 4,
    "intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "head_dim": 32,
    "num_local_experts": 4,
}
VARIANTS |= {
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
}


def model_of(variant: str) -> Any:
    """A model in f32 whose every tensor (norms and biases too) is random."""
    torch.manual_seed(0)
    name, keys = VARIANTS[variant]
    return randomised(transformers.AutoConfig.for_model(name, **{**COMMON, **keys}))


def randomised(config: Any, auto: Any = transformers.AutoModelForCausalLM) -> Any:
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        stored = [buffer for name, buffer in model.named_buffers() if name in model.state_dict()]
        for parameter in (*model.parameters(), *stored):
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1))
    return model.eval()


def save(model: Any, folder: Path, dtype: str = "float32") -> Path:
    """The folder that transformers writes, with a tokenizer."""
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def tokens() -> list[int]:
    return [int(each) for each in np.random.Generator(np.random.Philox(7)).integers(0, VOCAB, TOKENS)]


def logits_of(model: Any) -> NDArray[np.float32]:
    """f32[TOKENS, VOCAB], by transformers."""
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor([tokens()]), use_cache=False).logits[0].float().numpy()
    return found


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def edit_json(path: Path, **changes: Any) -> None:
    content: Mapping[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))
