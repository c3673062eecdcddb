"""ernie4_5_moe: ERNIE 4.5 with experts in most layers, chosen with a correction bias, beside shared ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import (
    Layer,
    assemble,
    attention,
    experts,
    gated,
    pre_norm_layer,
    with_shared_expert,
)
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.ernie4_5 import originals
from rkf.converters.families.expert_layout import expert_stacks
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_experts import INNER, SHARED_INNER, expert_config, expert_fields
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import count, flag, last_layer, number, optional_size, size, token, tokens
from rkf.converters.families.layout import Layout, Origin, as_named
from rkf.converters.families.layout_transforms import Squeezed
from rkf.model.ops import Route
from rkf.model.program import MAX_LAYERS, Program

_SHARED = "mlp.shared_experts"
_SELECT = "mlp.moe_statics.e_score_correction_bias"


@dataclass(frozen=True, kw_only=True)
class Ernie45MoeKeys(DecoderKeys):
    vocab_size: int = size(103424)
    hidden_size: int = size(2560)
    intermediate_size: int = size(12288)
    num_hidden_layers: int = size(28, most=MAX_LAYERS)
    num_attention_heads: int = size(20)
    num_key_value_heads: int | None = optional_size(4)
    max_position_embeddings: int = size(131072)
    rms_norm_eps: float = number(1e-5)
    tie_word_embeddings: bool = flag(True)
    rope_theta: float = number(500000.0)
    use_bias: bool = flag(False, or_null=True)
    moe_intermediate_size: int = size(1536)
    moe_num_experts: int = size(64, name="num_experts", aliases=("moe_num_experts",), most=1 << 16)
    moe_k: int = size(6, name="num_experts_per_tok", aliases=("moe_k",))
    moe_num_shared_experts: int = count(2)
    moe_layer_start_index: int = count(1)
    moe_layer_end_index: int | None = last_layer()
    moe_layer_interval: int = size(1)
    moe_norm_min: float = number(1e-12)
    bos_token_id: int | None = token(1)
    eos_token_id: tuple[int, ...] = tokens(2)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        last = self.num_hidden_layers - 1 if self.moe_layer_end_index is None else self.moe_layer_end_index
        return self.moe_layer_start_index <= layer <= last and (layer + 1) % self.moe_layer_interval == 0


def _program(config: Ernie45MoeKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    attends = attention(config, biases="qkvo" if config.use_bias else "", pairs="neighbours")
    dense = gated(config, bias=config.use_bias)
    layers = (
        pre_norm_layer(config, attends, _mixture(config) if config.is_sparse(number) else dense)
        for number in range(config.num_hidden_layers)
    )
    return assemble(config, layers, (turns,), head_bias=config.use_bias)


def _mixture(config: Ernie45MoeKeys) -> Layer:
    route = Route(
        src="h",
        dst="r",
        weight="mlp.gate.weight",
        select=_SELECT,
        experts=config.moe_num_experts,
        count=config.moe_k,
        score="softmax",
        normalise=True,
        floor=config.moe_norm_min,
    )
    chosen = experts(config, route, config.moe_intermediate_size)
    if not config.moe_num_shared_experts:
        return chosen
    inner = config.moe_num_shared_experts * config.moe_intermediate_size
    return with_shared_expert(config, chosen, inner, _SHARED, bias=config.use_bias)


def _layout(config: Ernie45MoeKeys) -> Layout:
    def rest(name: str) -> tuple[Origin, ...]:
        return (Origin((name,), steps=(Squeezed(0),)),) if name == _SELECT else as_named(name)

    count, inner = config.moe_num_experts, config.moe_intermediate_size
    widths = {"mlp": config.intermediate_size, _SHARED: config.moe_num_shared_experts * inner}
    usual = originals(config, widths, expert_stacks(count, inner, rest=rest))
    fused = tuple(f"mlp.experts.{number}.up_gate_proj.weight" for number in range(count))
    starts = {"mlp.experts.gate_proj.weight": 0, "mlp.experts.up_proj.weight": inner}

    def layout(name: str) -> tuple[Origin, ...]:
        if name not in starts:
            return usual(name)
        return *usual(name), Origin(fused, (slice(starts[name], starts[name] + inner),), stacked=True)

    return layout


def _gguf_layout(config: Ernie45MoeKeys) -> Layout:
    """gguf's tables lack the last word of the correction bias. llama.cpp's converter keeps its first axis."""

    def layout(name: str) -> tuple[Origin, ...]:
        if name != _SELECT:
            return as_named(name)
        return (Origin(("mlp.moe_statics.e_score_correction.bias",), steps=(Squeezed(0),)),)

    return layout


def _to_config(model: GgufModel) -> dict[str, Any]:
    own = model.own
    inner = own.get(INNER) or 0
    shared = own.get("expert_shared_count")
    return {
        **expert_config(own, "moe_num_experts", "moe_k"),
        "moe_intermediate_size": inner,
        "moe_num_shared_experts": shared or 0,
        "moe_layer_start_index": own.get("leading_dense_block_count", 0),
        "moe_layer_interval": own.get("interleave_moe_layer_step", 1),
        **whole_rope(model),
    }


def _to_fields(config: Ernie45MoeKeys) -> GgufFields:
    """A GGUF has no moe_norm_min; a sum of the highest softmax values never comes near it."""
    ends = config.moe_layer_end_index not in (None, config.num_hidden_layers - 1)
    config.refuse(ends, "moe_layer_end_index", "-1: llama.cpp has experts up to the last layer")
    config.refuse(config.moe_layer_interval != 1, "moe_layer_interval", "1: llama.cpp looks for experts in each layer")
    config.refuse(config.use_bias, "use_bias", "false: llama.cpp has no biases here")
    own = {
        **expert_fields(config.moe_num_experts, config.moe_k, config.moe_intermediate_size),
        SHARED_INNER: config.moe_num_shared_experts * config.moe_intermediate_size or None,
        "expert_shared_count": config.moe_num_shared_experts,
        "leading_dense_block_count": config.moe_layer_start_index,
        "interleave_moe_layer_step": config.moe_layer_interval,
    }
    return rope_fields(rope_scaling.whole(config), config.head_size).plus(own)


FAMILY = Family(
    name="ernie4_5_moe",
    class_name="Ernie4_5_MoeForCausalLM",
    keys=Ernie45MoeKeys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("ernie4_5-moe", _to_config, _to_fields, _gguf_layout),
    unused=lambda config, name: "mtp" in name,
    others=("ernie.",),
)
