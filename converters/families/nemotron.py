"""nemotron: Nemotron and Minitron. LayerNorm with (1 + w), squared relu without a gate, rope in half of a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import NormStyle, assemble, attention, pre_norm_layer, ungated
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import (
    LAYER_NORM_EPSILON,
    layer_norm_fields,
    only_usual_heads,
    partial_rope,
)
from rkf.converters.families.gguf_rope import rope_fields, shortest
from rkf.converters.families.keys import activation, flag, number, optional_number, size, token, tokens
from rkf.converters.families.layout import one_added
from rkf.model.program import Program

_STYLE = NormStyle(offset=1.0, centred=True, bias=True)


@dataclass(frozen=True, kw_only=True)
class NemotronKeys(DecoderKeys):
    vocab_size: int = size(256000)
    hidden_size: int = size(6144)
    intermediate_size: int = size(24576)
    num_attention_heads: int = size(48)
    hidden_act: str = activation("relu2")
    max_position_embeddings: int = size(4096)
    rms_norm_eps: float = number(1e-5, name="norm_eps")
    partial_rotary_factor: float | None = optional_number(0.5)
    attention_bias: bool = flag(False)
    mlp_bias: bool = flag(False)
    bos_token_id: int | None = token(2)
    eos_token_id: tuple[int, ...] = tokens(3)


def _program(config: NemotronKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.parameters(config), config)
    attends = attention(config, biases="qkvo" if config.attention_bias else "")
    layer = pre_norm_layer(config, attends, ungated(config, bias=config.mlp_bias), style=_STYLE)
    return assemble(config, [layer] * config.num_hidden_layers, (turns,), final_norm=_STYLE)


def _to_config(model: GgufModel) -> dict[str, Any]:
    own = model.own
    return {
        "norm_eps": shortest(own.get(LAYER_NORM_EPSILON)),
        "hidden_act": "relu2",
        "attention_bias": "blk.0.attn_q.bias" in model.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in model.tensors,
        **partial_rope(model),
    }


def _to_fields(config: NemotronKeys) -> GgufFields:
    only_usual_heads(config)
    config.refuse(config.tie_word_embeddings, "tie_word_embeddings", "false: llama.cpp needs a separate head")
    return rope_fields(rope_scaling.parameters(config), config.head_size).plus(layer_norm_fields(config))


FAMILY = Family(
    name="nemotron",
    class_name="NemotronForCausalLM",
    keys=NemotronKeys,
    program=_program,
    gguf=GgufForm("nemotron", _to_config, _to_fields, lambda config: one_added, activation="relu2"),
)
