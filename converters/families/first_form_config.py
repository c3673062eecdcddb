"""Rebuilds config.json for a 1.0 file, which does not store it, from its numbers and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rkf.converters.families import FAMILIES, rope_scaling
from rkf.converters.families.blocks import EMBEDDING, HEAD
from rkf.model.first_form import ModelConfig

# ModelConfig field -> config.json key.
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "context_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
}
_TORCH = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def config_of(metadata: Any, dtypes: Mapping[str, str]) -> dict[str, Any]:
    """A config.json. metadata: `metadata.model` of a 1.0 file. dtypes: by tensor name, without aliases."""
    config = ModelConfig.from_metadata(metadata)
    # A GGUF calls a mistral "llama"; in transformers only mistral has a window.
    windowed = config.architecture == "llama" and config.sliding_window is not None
    name = "mistral" if windowed else config.architecture
    window = config.sliding_window is not None
    return {
        "architectures": [FAMILIES[name].class_name],
        "model_type": name,
        **{theirs: getattr(config, ours) for ours, theirs in _KEYS.items()},
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in dtypes,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "hidden_act": "silu",
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in dtypes,
        **rope_scaling.spelt(_rope(config)),
        "sliding_window": config.sliding_window,
        **({"use_sliding_window": True, "max_window_layers": 0} if window else {}),
        "tie_word_embeddings": HEAD not in dtypes,
        "torch_dtype": _TORCH[dtypes[EMBEDDING]],
    }


def _rope(config: ModelConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    scaling = config.rope_scaling
    if scaling is not None:
        found |= {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.type == "llama3":
            found["low_freq_factor"] = scaling.low_freq_factor
            found["high_freq_factor"] = scaling.high_freq_factor
            found["original_max_position_embeddings"] = scaling.original_context
    return found
