"""mixtral: Mixtral. A mistral with experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import assemble, attention, experts, pre_norm_layer, softmax_route
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.expert_layout import expert_stacks, renamed
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_experts import expert_config, expert_fields
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import number, optional_size, size, token, tokens
from rkf.converters.families.layout import Layout
from rkf.converters.families.llama import unpermuted
from rkf.converters.families.windows import WINDOW
from rkf.model.program import Program


@dataclass(frozen=True, kw_only=True)
class MixtralKeys(DecoderKeys):
    intermediate_size: int = size(14336)
    num_key_value_heads: int | None = optional_size(8)
    max_position_embeddings: int = size(131072)
    rms_norm_eps: float = number(1e-5)
    rope_theta: float = number(1000000.0)
    sliding_window: int | None = optional_size()
    num_experts: int = size(8, aliases=("num_local_experts",), most=1 << 16)
    num_experts_per_tok: int = size(2)
    bos_token_id: int | None = token(1)
    eos_token_id: tuple[int, ...] = tokens(2)


def _program(config: MixtralKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    route = softmax_route(config.num_experts, config.num_experts_per_tok, normalise=True)
    chosen = experts(config, route, config.intermediate_size)
    layer = pre_norm_layer(config, attention(config, window=config.sliding_window), chosen)
    return assemble(config, [layer] * config.num_hidden_layers, (turns,))


def _layout(config: MixtralKeys) -> Layout:
    matrices = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    rest = renamed({"mlp.": "block_sparse_moe."})
    return expert_stacks(
        config.num_experts, config.intermediate_size, "block_sparse_moe.experts", names=matrices, rest=rest
    )


def _to_config(model: GgufModel) -> dict[str, Any]:
    return {
        **expert_config(model.own),
        "sliding_window": model.own.get(WINDOW) or None,
        **whole_rope(model),
    }


def _to_fields(config: MixtralKeys) -> GgufFields:
    config.refuse(config.sliding_window is not None, "sliding_window", "null: llama.cpp has no windows here")
    return rope_fields(rope_scaling.whole(config), config.head_size).plus(
        expert_fields(config.num_experts, config.num_experts_per_tok)
    )


def _claims(own: Mapping[str, Any]) -> bool:
    return bool(own.get("expert_count"))


FAMILY = Family(
    name="mixtral",
    class_name="MixtralForCausalLM",
    keys=MixtralKeys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("llama", _to_config, _to_fields, unpermuted, _claims, ignored=(WINDOW,), factors=True),
)
