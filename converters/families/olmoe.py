"""olmoe: OLMoE. Experts in every layer; norms of q and k over all heads; optionally a limit of q, k and v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import HeadNorm, assemble, attention, experts, pre_norm_layer, softmax_route
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.expert_layout import expert_stacks
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_experts import expert_config, expert_fields
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import flag, number, optional_number, size, tokens
from rkf.converters.families.layout import Layout
from rkf.model.program import MAX_LAYERS, Program


@dataclass(frozen=True, kw_only=True)
class OlmoeKeys(DecoderKeys):
    vocab_size: int = size(50304)
    hidden_size: int = size(2048)
    intermediate_size: int = size(2048)
    num_hidden_layers: int = size(16, most=MAX_LAYERS)
    num_attention_heads: int = size(16)
    max_position_embeddings: int = size(4096)
    rms_norm_eps: float = number(1e-5)
    attention_bias: bool = flag(False)
    clip_qkv: float | None = optional_number()
    num_experts: int = size(64, name="num_local_experts", aliases=("num_experts",), most=1 << 16)
    num_experts_per_tok: int = size(8)
    norm_topk_prob: bool = flag(False)
    eos_token_id: tuple[int, ...] = tokens(50279)

    def __post_init__(self) -> None:
        super().__post_init__()
        wide = self.hidden_size // self.num_attention_heads
        self.refuse(self.head_dim not in (None, wide), "head_dim", f"{wide}, for which the norms of q and k are made")


def _program(config: OlmoeKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    attends = attention(
        config,
        biases="qkvo" if config.attention_bias else "",
        head_norm=HeadNorm(config.rms_norm_eps, whole=True),
        clip=config.clip_qkv,
    )
    route = softmax_route(config.num_experts, config.num_experts_per_tok, normalise=config.norm_topk_prob)
    layer = pre_norm_layer(config, attends, experts(config, route, config.intermediate_size))
    return assemble(config, [layer] * config.num_hidden_layers, (turns,))


def _layout(config: OlmoeKeys) -> Layout:
    return expert_stacks(config.num_experts, config.intermediate_size)


def _to_config(model: GgufModel) -> dict[str, Any]:
    """llama.cpp never divides by the sum of the chosen weights."""
    return {**expert_config(model.own), **whole_rope(model)}


def _to_fields(config: OlmoeKeys) -> GgufFields:
    config.refuse(config.norm_topk_prob, "norm_topk_prob", "false, as llama.cpp computes it")
    grouped = config.kv_heads != config.num_attention_heads
    config.refuse(grouped, "num_key_value_heads", "as many as num_attention_heads, which llama.cpp assumes")
    config.refuse(config.clip_qkv is not None, "clip_qkv", "null: llama.cpp has no limit here")
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    return rope_fields(rope_scaling.whole(config), config.head_size).plus(
        expert_fields(config.num_experts, config.num_experts_per_tok)
    )


FAMILY = Family(
    name="olmoe",
    class_name="OlmoeForCausalLM",
    keys=OlmoeKeys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("olmoe", _to_config, _to_fields),
)
