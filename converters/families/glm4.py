"""glm4: GLM 4 (0414), dense. Norms on both sides of a branch, fused gate/up, rope of neighbours in half of a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import assemble, attention, double_norm_layer, gated
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import partial_rope
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import flag, number, optional_number, optional_size, size, tokens
from rkf.converters.families.layout import Layout, fused_rows
from rkf.errors import UnsupportedError
from rkf.model.program import MAX_LAYERS, Program

_NORMS = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


@dataclass(frozen=True, kw_only=True)
class Glm4Keys(DecoderKeys):
    vocab_size: int = size(151552)
    intermediate_size: int = size(13696)
    num_hidden_layers: int = size(40, most=MAX_LAYERS)
    num_key_value_heads: int | None = optional_size(2)
    head_dim: int = size(128)
    max_position_embeddings: int = size(131072)
    rms_norm_eps: float = number(1.5625e-7)
    partial_rotary_factor: float | None = optional_number(0.5)
    attention_bias: bool = flag(True)
    eos_token_id: tuple[int, ...] = tokens(151329, 151336, 151338, null_is_default=True)


def _program(config: Glm4Keys) -> Program:
    turns = rope_scaling.table(rope_scaling.parameters(config), config)
    attends = attention(config, biases="qkv" if config.attention_bias else "", pairs="neighbours")
    layer = double_norm_layer(config, attends, gated(config), _NORMS)
    return assemble(config, [layer] * config.num_hidden_layers, (turns,))


def _layout(config: Glm4Keys) -> Layout:
    inner = config.intermediate_size
    return fused_rows({"mlp.gate_up_proj": {"mlp.gate_proj": inner, "mlp.up_proj": inner}})


def _to_config(model: GgufModel) -> dict[str, Any]:
    sections = model.own.get("rope.dimension_sections", (0, 0))
    if sections[0] and sections[1]:  # llama.cpp then turns halves in place of neighbours
        raise UnsupportedError(f"rope.dimension_sections: {list(map(int, sections))} is not supported; expected none")
    return {
        "attention_bias": "blk.0.attn_q.bias" in model.tensors,
        **partial_rope(model),
    }


def _to_fields(config: Glm4Keys) -> GgufFields:
    return rope_fields(rope_scaling.parameters(config), config.head_size)


FAMILY = Family(
    name="glm4",
    class_name="Glm4ForCausalLM",
    keys=Glm4Keys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("glm4", _to_config, _to_fields, _layout),
)
