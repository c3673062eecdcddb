"""qwen2_moe: Qwen 1.5 and 2 with experts in all or some layers, and a shared expert weighed by a sigmoid."""

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
    softmax_route,
    with_shared_expert,
)
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.expert_layout import expert_stacks
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_experts import SHARED_INNER, expert_config, expert_fields, inner_width
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import (
    FULL,
    SLIDING,
    count,
    flag,
    layer_numbers,
    layer_types,
    optional_size,
    size,
    unused_size,
)
from rkf.converters.families.layout import Layout
from rkf.errors import SourceError, UnsupportedError
from rkf.model.ops import Route
from rkf.model.program import MAX_LAYERS, Program


@dataclass(frozen=True, kw_only=True)
class QwenMoeKeys(DecoderKeys):
    """Keys of Qwen 2 and 3 with experts."""

    vocab_size: int = size(151936)
    hidden_size: int = size(2048)
    num_hidden_layers: int = size(24, most=MAX_LAYERS)
    max_position_embeddings: int = size(32768)
    use_sliding_window: bool = flag(False)
    decoder_sparse_step: int = size(1)
    mlp_only_layers: tuple[int, ...] = layer_numbers()
    moe_intermediate_size: int = size(1408)
    num_experts: int = size(60, most=1 << 16)
    num_experts_per_tok: int = size(4)
    norm_topk_prob: bool = flag(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts_per_tok > self.num_experts:
            raise SourceError(
                f"num_experts_per_tok: expected at most num_experts ({self.num_experts}), "
                f"got {self.num_experts_per_tok}"
            )

    @property
    def route(self) -> Route:
        return softmax_route(self.num_experts, self.num_experts_per_tok, normalise=self.norm_topk_prob)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


@dataclass(frozen=True, kw_only=True)
class Qwen2MoeKeys(QwenMoeKeys):
    intermediate_size: int = size(5632)
    num_attention_heads: int = size(16)
    num_key_value_heads: int | None = optional_size(16)
    qkv_bias: bool = flag(True)
    sliding_window: int | None = unused_size(4096)
    max_window_layers: int = count(28)
    layer_types: tuple[str, ...] | None = layer_types()
    shared_expert_intermediate_size: int = size(5632)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise SourceError(f"layer_types: expected {self.num_hidden_layers} words, got {len(self.layer_types)}")
        if self.use_sliding_window and self.sliding_window is None and SLIDING in self.kinds:
            raise SourceError("sliding_window: expected a number above 0 with use_sliding_window, got null or 0")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of attention of each layer. By default every other one has a window."""
        return self.layer_types or tuple(
            SLIDING if number % 2 == 0 and number < self.max_window_layers else FULL
            for number in range(self.num_hidden_layers)
        )

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer, None for full attention."""
        window = self.sliding_window if self.use_sliding_window else None
        return [window if kind == SLIDING else None for kind in self.kinds]


def _program(config: Qwen2MoeKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    layers = (_layer(config, number, window) for number, window in enumerate(config.windows))
    return assemble(config, layers, (turns,))


def _layer(config: Qwen2MoeKeys, number: int, window: int | None) -> Layer:
    attends = attention(config, biases="qkv" if config.qkv_bias else "", window=window)
    if not config.is_sparse(number):
        return pre_norm_layer(config, attends, gated(config))
    chosen = experts(config, config.route, config.moe_intermediate_size)
    inner = config.shared_expert_intermediate_size
    feeds = with_shared_expert(config, chosen, inner, "mlp.shared_expert", switch="mlp.shared_expert_gate")
    return pre_norm_layer(config, attends, feeds)


def layout(config: QwenMoeKeys) -> Layout:
    return expert_stacks(config.num_experts, config.moe_intermediate_size)


def _to_config(model: GgufModel) -> dict[str, Any]:
    """llama.cpp never divides by the sum of the chosen weights, and assumes experts in every layer."""
    own = model.own
    return {
        **expert_config(own),
        "moe_intermediate_size": inner_width(own),
        "shared_expert_intermediate_size": own.get(SHARED_INNER) or own["feed_forward_length"],
        "qkv_bias": "blk.0.attn_q.bias" in model.tensors,
        **whole_rope(model),
    }


def _to_fields(config: Qwen2MoeKeys) -> GgufFields:
    config.refuse(config.norm_topk_prob, "norm_topk_prob", "false, as llama.cpp computes it")
    config.refuse(any(config.windows), "use_sliding_window", "false: llama.cpp has no windows here")
    shared = {SHARED_INNER: config.shared_expert_intermediate_size}
    return rope_fields(rope_scaling.whole(config), config.head_size).plus(mixture_fields(config) | shared)


def mixture_fields(config: QwenMoeKeys) -> dict[str, Any]:
    """The fields of the experts; UnsupportedError if some layers have none."""
    if not all(map(config.is_sparse, range(config.num_hidden_layers))):
        raise UnsupportedError("mlp_only_layers, decoder_sparse_step: a GGUF cannot store layers without experts")
    return expert_fields(config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size)


FAMILY = Family(
    name="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    keys=Qwen2MoeKeys,
    program=_program,
    layout=layout,
    gguf=GgufForm("qwen2moe", _to_config, _to_fields),
)
