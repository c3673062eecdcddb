"""qwen3_5_moe_text: Qwen 3.5 with experts in every layer, and a shared one weighed by a sigmoid. Text only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families.blocks import experts, softmax_route, with_shared_expert
from rkf.converters.families.expert_layout import expert_stacks
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_experts import INNER, SHARED_INNER, expert_config, expert_fields, inner_width
from rkf.converters.families.keys import optional_size, size
from rkf.converters.families.layout import Layout
from rkf.converters.families.qwen3_5 import (
    Qwen35Keys,
    gguf_layout,
    layout,
    notes,
    program,
    to_config,
    to_fields,
    wrapper,
)
from rkf.model.program import MAX_LAYERS, Program


@dataclass(frozen=True, kw_only=True)
class Qwen35MoeKeys(Qwen35Keys):
    hidden_size: int = size(2048)
    num_hidden_layers: int = size(40, most=MAX_LAYERS)
    num_key_value_heads: int | None = optional_size(2)
    moe_intermediate_size: int = size(512)
    shared_expert_intermediate_size: int = size(512)
    num_experts: int = size(256, most=1 << 16)
    num_experts_per_tok: int = size(8)


def _program(config: Qwen35MoeKeys) -> Program:
    route = softmax_route(config.num_experts, config.num_experts_per_tok, normalise=True)
    chosen = experts(config, route, config.moe_intermediate_size)
    inner = config.shared_expert_intermediate_size
    feeds = with_shared_expert(config, chosen, inner, "mlp.shared_expert", switch="mlp.shared_expert_gate")
    return program(config, feeds)


def _layout(config: Qwen35MoeKeys) -> Layout:
    return expert_stacks(config.num_experts, config.moe_intermediate_size, rest=layout(config))


def _to_config(model: GgufModel) -> dict[str, Any]:
    """No layer is dense, so intermediate_size has no meaning; some writers leave it out."""
    own = model.own
    return {
        **to_config(model),
        **expert_config(own),
        "intermediate_size": own.get("feed_forward_length") or own.get(INNER),
        "moe_intermediate_size": inner_width(own),
        "shared_expert_intermediate_size": own.get(SHARED_INNER) or own.get("feed_forward_length"),
    }


def _to_fields(config: Qwen35MoeKeys) -> GgufFields:
    mixture = expert_fields(config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size)
    shared = {SHARED_INNER: config.shared_expert_intermediate_size}
    return to_fields(config).plus(mixture | shared)


FAMILY = Family(
    name="qwen3_5_moe_text",
    class_name="Qwen3_5MoeForCausalLM",
    keys=Qwen35MoeKeys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("qwen35moe", _to_config, _to_fields, gguf_layout, notes=notes),
    wrapper=wrapper("qwen3_5_moe"),
    unused=lambda config, name: name.startswith("mtp."),
)
