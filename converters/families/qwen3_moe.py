"""qwen3_moe: Qwen 3 with experts in all or some layers, no shared expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import (
    HeadNorm,
    Layer,
    assemble,
    attention,
    experts,
    gated,
    pre_norm_layer,
)
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_experts import expert_config, inner_width
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import flag, optional_count, optional_size, size
from rkf.converters.families.qwen2_moe import QwenMoeKeys, layout, mixture_fields
from rkf.converters.families.windows import WINDOW, used_window
from rkf.model.program import Program


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeKeys(QwenMoeKeys):
    intermediate_size: int = size(6144)
    num_key_value_heads: int | None = optional_size(4)
    attention_bias: bool = flag(False)
    sliding_window: int | None = optional_count(4096)
    moe_intermediate_size: int = size(768)
    num_experts: int = size(128, name="num_local_experts", aliases=("num_experts",), most=1 << 16)
    num_experts_per_tok: int = size(8)

    @property
    def window(self) -> int | None:
        """The window of every layer, if it is used."""
        return used_window(self.use_sliding_window, self.sliding_window)


def _program(config: Qwen3MoeKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    layers = (_layer(config, config.is_sparse(number)) for number in range(config.num_hidden_layers))
    return assemble(config, layers, (turns,))


def _layer(config: Qwen3MoeKeys, sparse: bool) -> Layer:
    attends = attention(
        config,
        biases="qkvo" if config.attention_bias else "",
        head_norm=HeadNorm(config.rms_norm_eps),
        window=config.window,
    )
    chosen = experts(config, config.route, config.moe_intermediate_size)
    return pre_norm_layer(config, attends, chosen if sparse else gated(config))


def _to_config(model: GgufModel) -> dict[str, Any]:
    """llama.cpp always divides by the sum of the chosen weights, and assumes experts in every layer."""
    own = model.own
    window = own.get(WINDOW) or None
    return {
        **expert_config(own),
        "moe_intermediate_size": inner_width(own),
        "norm_topk_prob": True,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        **whole_rope(model),
    }


def _to_fields(config: Qwen3MoeKeys) -> GgufFields:
    config.refuse(not config.norm_topk_prob, "norm_topk_prob", "true, as llama.cpp computes it")
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    own = {WINDOW: config.window, **mixture_fields(config)}
    return rope_fields(rope_scaling.whole(config), config.head_size).plus(own)


FAMILY = Family(
    name="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    keys=Qwen3MoeKeys,
    program=_program,
    layout=layout,
    gguf=GgufForm("qwen3moe", _to_config, _to_fields, ignored=(WINDOW,)),
)
