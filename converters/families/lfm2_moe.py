"""lfm2_moe: LFM2 with experts in all but the first layers, chosen by sigmoids with a correction bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families.blocks import experts, gated
from rkf.converters.families.expert_layout import expert_stacks, renamed
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_experts import FUNCTION, INNER, SIGMOID, expert_config, expert_fields, only_by_sigmoid
from rkf.converters.families.keys import count, flag, number, size
from rkf.converters.families.layout import Layout, Origin, as_named
from rkf.converters.families.lfm2 import NAMES, Lfm2BaseKeys, gguf_layout, layout, program, to_config, to_fields
from rkf.model.ops import Route
from rkf.model.program import Program

_BIAS = "mlp.expert_bias"
_ADDED = 1e-6  # to the sum that the weights are divided by


@dataclass(frozen=True, kw_only=True)
class Lfm2MoeKeys(Lfm2BaseKeys):
    hidden_size: int = size(2048)
    intermediate_size: int = size(7168)
    moe_intermediate_size: int = size(1792)
    num_dense_layers: int = count(2)
    num_experts: int = size(32, most=1 << 16)
    num_experts_per_tok: int = size(4)
    use_expert_bias: bool = flag(True)
    routed_scaling_factor: float = number(1.0)
    norm_topk_prob: bool = flag(True)


def _program(config: Lfm2MoeKeys) -> Program:
    route = Route(
        src="h",
        dst="r",
        weight="mlp.gate.weight",
        select=_BIAS if config.use_expert_bias else None,
        experts=config.num_experts,
        count=config.num_experts_per_tok,
        score="sigmoid",
        normalise=config.norm_topk_prob,
        add=_ADDED if config.norm_topk_prob else 0.0,
        scale=config.routed_scaling_factor,
    )
    chosen, dense = experts(config, route, config.moe_intermediate_size), gated(config)
    layers = range(config.num_hidden_layers)
    return program(config, [dense if number < config.num_dense_layers else chosen for number in layers])


def _layout(config: Lfm2MoeKeys) -> Layout:
    own, rest = layout(config), renamed({"mlp.gate.": "feed_forward.gate.", _BIAS: "feed_forward.expert_bias"})

    def other(name: str) -> tuple[Origin, ...]:
        return rest(name) if name == _BIAS or name.startswith("mlp.gate.") else own(name)

    matrices = {part: NAMES[f"mlp.{part}."].split(".")[1] for part in ("gate_proj", "up_proj", "down_proj")}
    return expert_stacks(
        config.num_experts, config.moe_intermediate_size, "feed_forward.experts", names=matrices, rest=other
    )


def _gguf_layout(config: Lfm2MoeKeys) -> Layout:
    own = gguf_layout(config)
    return lambda name: as_named("feed_forward.expert_bias.bias") if name == _BIAS else own(name)


def _to_config(model: GgufModel) -> dict[str, Any]:
    own = model.own
    only_by_sigmoid(own)
    return {
        **to_config(model),
        **expert_config(own),
        "moe_intermediate_size": own.get(INNER),
        "num_dense_layers": own.get("leading_dense_block_count", 0),
        "use_expert_bias": f"blk.{own['block_count'] - 1}.exp_probs_b.bias" in model.tensors,
    }


def _to_fields(config: Lfm2MoeKeys) -> GgufFields:
    config.refuse(not config.norm_topk_prob, "norm_topk_prob", "true, as llama.cpp computes it")
    config.refuse(config.routed_scaling_factor != 1, "routed_scaling_factor", "1, as llama.cpp computes it")
    config.refuse(not config.use_expert_bias, "use_expert_bias", "true: llama.cpp has the bias here")
    own = {
        **expert_fields(config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size),
        "leading_dense_block_count": config.num_dense_layers,
        FUNCTION: SIGMOID,
    }
    return to_fields(config).plus(own)


FAMILY = Family(
    name="lfm2_moe",
    class_name="Lfm2MoeForCausalLM",
    keys=Lfm2MoeKeys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("lfm2moe", _to_config, _to_fields, _gguf_layout),
)
