"""seed_oss: Seed-OSS. A llama with biases of q, k and v, and optionally of o and the feed-forward part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import assemble, attention, gated, pre_norm_layer
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import flag, optional_size, size, token, tokens
from rkf.model.program import MAX_LAYERS, Program


@dataclass(frozen=True, kw_only=True)
class SeedOssKeys(DecoderKeys):
    vocab_size: int = size(155136)
    intermediate_size: int = size(27648)
    num_hidden_layers: int = size(64, most=MAX_LAYERS)
    num_attention_heads: int = size(80)
    num_key_value_heads: int | None = optional_size(8)
    head_dim: int | None = optional_size(128)
    max_position_embeddings: int = size(524288)
    attention_bias: bool = flag(True)
    attention_out_bias: bool = flag(False)
    mlp_bias: bool = flag(False)
    bos_token_id: int | None = token(0)
    eos_token_id: tuple[int, ...] = tokens(2)


def _program(config: SeedOssKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    biases = ("qkv" if config.attention_bias else "") + ("o" if config.attention_out_bias else "")
    layer = pre_norm_layer(config, attention(config, biases=biases), gated(config, bias=config.mlp_bias))
    return assemble(config, [layer] * config.num_hidden_layers, (turns,))


def _to_config(model: GgufModel) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in model.tensors,
        "attention_out_bias": "blk.0.attn_output.bias" in model.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in model.tensors,
        **whole_rope(model),
    }


def _to_fields(config: SeedOssKeys) -> GgufFields:
    config.refuse(config.attention_out_bias, "attention_out_bias", "false: llama.cpp has no such bias here")
    config.refuse(config.mlp_bias, "mlp_bias", "false: llama.cpp has no such biases here")
    return rope_fields(rope_scaling.whole(config), config.head_size)


FAMILY = Family(
    name="seed_oss",
    class_name="SeedOssForCausalLM",
    keys=SeedOssKeys,
    program=_program,
    gguf=GgufForm("seed_oss", _to_config, _to_fields),
)
