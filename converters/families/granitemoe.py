"""granitemoe: Granite 3 with experts in every layer. Its stacks hold gate and up in one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families.blocks import Layer, experts
from rkf.converters.families.expert_layout import fused_stacks, renamed
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_experts import expert_config, expert_fields
from rkf.converters.families.granite import GraniteKeys, program, scaled_attention, to_config, to_fields
from rkf.converters.families.keys import size
from rkf.converters.families.layout import Layout
from rkf.converters.families.llama import unpermuted
from rkf.model.ops import Route
from rkf.model.program import Program


@dataclass(frozen=True, kw_only=True)
class GraniteMoeKeys(GraniteKeys):
    num_local_experts: int = size(8, most=1 << 16)
    num_experts_per_tok: int = size(2)


def _program(config: GraniteMoeKeys) -> Program:
    return program(config, [(scaled_attention(config), mixture(config))] * config.num_hidden_layers)


def mixture(config: GraniteMoeKeys) -> Layer:
    """The experts of the highest logits, weighted by the softmax over these alone."""
    route = Route(
        src="h",
        dst="r",
        weight="mlp.gate.weight",
        experts=config.num_local_experts,
        count=config.num_experts_per_tok,
        score="chosen",
    )
    return experts(config, route, config.intermediate_size)


def _layout(config: GraniteMoeKeys) -> Layout:
    return fused_stacks(
        config.num_local_experts,
        config.intermediate_size,
        gate_up="block_sparse_moe.input_linear.weight",
        down="block_sparse_moe.output_linear.weight",
        rest=renamed({"mlp.gate.": "block_sparse_moe.router.layer."}),
    )


def _to_config(model: GgufModel) -> dict[str, Any]:
    return {**to_config(model), **expert_config(model.own, "num_local_experts")}


def _to_fields(config: GraniteMoeKeys) -> GgufFields:
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    return to_fields(config).plus(expert_fields(config.num_local_experts, config.num_experts_per_tok))


FAMILY = Family(
    name="granitemoe",
    class_name="GraniteMoeForCausalLM",
    keys=GraniteMoeKeys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("granitemoe", _to_config, _to_fields, unpermuted, factors=True),
)
