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
    softmax_route,
)
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.expert_layout import expert_stacks
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import flag, layer_numbers, optional_size, size
from rkf.converters.families.layout import Layout
from rkf.errors import SourceError, UnsupportedError
from rkf.model.ops import Route
from rkf.model.program import MAX_LAYERS, Program


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeKeys(DecoderKeys):
    vocab_size: int = size(151936)
    hidden_size: int = size(2048)
    intermediate_size: int = size(6144)
    num_hidden_layers: int = size(24, most=MAX_LAYERS)
    num_key_value_heads: int | None = optional_size(4)
    max_position_embeddings: int = size(32768)
    attention_bias: bool = flag(False)
    use_sliding_window: bool = flag(False)
    sliding_window: int | None = optional_size(4096)
    decoder_sparse_step: int = size(1)
    moe_intermediate_size: int = size(768)
    num_experts: int = size(128, aliases=("num_local_experts",), most=1 << 16)
    num_experts_per_tok: int = size(8)
    norm_topk_prob: bool = flag(False)
    mlp_only_layers: tuple[int, ...] = layer_numbers()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts_per_tok > self.num_experts:
            raise SourceError(
                f"num_experts_per_tok: expected at most num_experts ({self.num_experts}), "
                f"got {self.num_experts_per_tok}"
            )

    @property
    def window(self) -> int | None:
        """The window of every layer, if it is used."""
        return self.sliding_window if self.use_sliding_window else None

    @property
    def route(self) -> Route:
        return softmax_route(self.num_experts, self.num_experts_per_tok, normalise=self.norm_topk_prob)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


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


def _layout(config: Qwen3MoeKeys) -> Layout:
    return expert_stacks(config.num_experts, config.moe_intermediate_size)


def _to_config(model: GgufModel) -> dict[str, Any]:
    """llama.cpp always divides by the sum of the chosen weights, and assumes experts in every layer."""
    own = model.own
    window = own.get("attention.sliding_window") or None
    return {
        "num_experts": own.get("expert_count"),
        "num_experts_per_tok": own.get("expert_used_count"),
        "moe_intermediate_size": own.get("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        **whole_rope(model),
    }


def _to_fields(config: Qwen3MoeKeys) -> GgufFields:
    config.refuse(not config.norm_topk_prob, "norm_topk_prob", "true, as llama.cpp computes it")
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    if not all(map(config.is_sparse, range(config.num_hidden_layers))):
        raise UnsupportedError("mlp_only_layers, decoder_sparse_step: a GGUF cannot store layers without experts")
    own = {
        "attention.sliding_window": config.window,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }
    return rope_fields(rope_scaling.whole(config), config.head_size).plus(own)


FAMILY = Family(
    name="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    keys=Qwen3MoeKeys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("qwen3moe", _to_config, _to_fields),
)
