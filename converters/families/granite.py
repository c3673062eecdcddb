"""granite: Granite 3. A llama with multipliers of the embedding, scores, both residual additions and logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import Layer, assemble, attention, gated, pre_norm_layer
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import head_size, whole_rope
from rkf.converters.families.gguf_rope import rope_fields, shortest
from rkf.converters.families.keys import number
from rkf.converters.families.llama import LlamaKeys, unpermuted
from rkf.errors import UnsupportedError
from rkf.model.program import Program

ROPE_SWITCH = "rope.scaling.finetuned"  # in this architecture and that of the hybrid, false means no rope


@dataclass(frozen=True, kw_only=True)
class GraniteKeys(LlamaKeys):
    embedding_multiplier: float = number(1.0)
    attention_multiplier: float = number(1.0)
    residual_multiplier: float = number(1.0)
    logits_scaling: float = number(1.0)


def _program(config: GraniteKeys) -> Program:
    return program(config, [(scaled_attention(config), gated(config, bias=config.mlp_bias))] * config.num_hidden_layers)


def program(config: GraniteKeys, branches: Iterable[tuple[Layer, Layer]], *, turns: bool = True) -> Program:
    """branches: the attention and the feed-forward part of each layer. turns: whether there is a rope."""
    return assemble(
        config,
        (pre_norm_layer(config, *pair, residual=config.residual_multiplier) for pair in branches),
        (rope_scaling.table(rope_scaling.whole(config), config),) if turns else (),
        embedding_scale=config.embedding_multiplier,
        logit_scale=1 / config.logits_scaling,
    )


def scaled_attention(config: GraniteKeys, rope: int | None = 0) -> Layer:
    """rope: the number of its table, None for none."""
    biases = "qkvo" if config.attention_bias else ""
    return attention(config, biases=biases, rope=rope, scale=config.attention_multiplier)


def to_config(model: GgufModel) -> dict[str, Any]:
    """Where a GGUF has no scale, llama.cpp takes 1, but head_size ** -0.5 for the scores."""
    own, width = model.own, head_size(model)
    return {
        "attention_bias": "blk.0.attn_q.bias" in model.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in model.tensors,
        "embedding_multiplier": shortest(own.get("embedding_scale") or 1.0),
        "attention_multiplier": shortest(own.get("attention.scale") or width**-0.5),
        "residual_multiplier": shortest(own.get("residual_scale") or 1.0),
        "logits_scaling": shortest(own.get("logit_scale") or 1.0),
        **whole_rope(model),
    }


def _to_config(model: GgufModel) -> dict[str, Any]:
    if not model.own.get(ROPE_SWITCH, True):
        raise UnsupportedError(f"{ROPE_SWITCH} is false: a model without rope is not supported in this architecture")
    return to_config(model)


def to_fields(config: GraniteKeys) -> GgufFields:
    own = {
        "embedding_scale": config.embedding_multiplier,
        "attention.scale": config.attention_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }
    return rope_fields(rope_scaling.whole(config), config.head_size).plus(own)


FAMILY = Family(
    name="granite",
    class_name="GraniteForCausalLM",
    keys=GraniteKeys,
    program=_program,
    gguf=GgufForm("granite", _to_config, to_fields, unpermuted, factors=True),
)
