"""glm4_moe: GLM 4.5 to 4.7, mixtures. Rope in half of a head (as halves, unlike dense glm4), optional q/k norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import HeadNorm, assemble, attention, pre_norm_layer
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import partial_rope
from rkf.converters.families.gguf_experts import only_by_sigmoid
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.grouped_experts import (
    GroupedExperts,
    expert_layout,
    feed_forward,
    gguf_expert_layout,
    grouped_config,
    grouped_fields,
    is_beyond,
)
from rkf.converters.families.keys import count, flag, number, optional_number, optional_size, size
from rkf.model.program import MAX_LAYERS, Program


@dataclass(frozen=True, kw_only=True)
class Glm4MoeKeys(GroupedExperts):
    vocab_size: int = size(151552)
    intermediate_size: int = size(10944)
    num_hidden_layers: int = size(46, most=MAX_LAYERS)
    num_attention_heads: int = size(96)
    num_key_value_heads: int | None = optional_size(8)
    max_position_embeddings: int = size(131072)
    rms_norm_eps: float = number(1e-5)
    partial_rotary_factor: float | None = optional_number(0.5)
    attention_bias: bool = flag(False)
    use_qk_norm: bool = flag(False)
    moe_intermediate_size: int = size(1408)
    n_routed_experts: int = size(128, name="num_local_experts", aliases=("n_routed_experts",), most=1 << 16)
    n_group: int = size(1)
    topk_group: int = size(1)
    routed_scaling_factor: float = number(1.0)
    first_k_dense_replace: int = count(1)


def _program(config: Glm4MoeKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.parameters(config), config)
    attends = attention(
        config,
        biases="qkv" if config.attention_bias else "",
        head_norm=HeadNorm(config.rms_norm_eps) if config.use_qk_norm else None,
    )
    layers = range(config.num_hidden_layers)
    return assemble(config, [pre_norm_layer(config, attends, feed_forward(config, n)) for n in layers], (turns,))


def _to_config(model: GgufModel) -> dict[str, Any]:
    only_by_sigmoid(model.own)
    return {
        **grouped_config(model.own),
        "attention_bias": "blk.0.attn_q.bias" in model.tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in model.tensors,
        **partial_rope(model),
    }


def _to_fields(config: Glm4MoeKeys) -> GgufFields:
    return rope_fields(rope_scaling.parameters(config), config.head_size).plus(grouped_fields(config))


FAMILY = Family(
    name="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    keys=Glm4MoeKeys,
    program=_program,
    layout=expert_layout,
    gguf=GgufForm("glm4moe", _to_config, _to_fields, lambda config: gguf_expert_layout()),
    unused=is_beyond,
)
