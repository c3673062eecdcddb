"""starcoder2: StarCoder 2. LayerNorm, a feed-forward part without a gate, biases everywhere, optionally a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import LAYER_NORM, assemble, attention, pre_norm_layer, ungated
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import (
    LAYER_NORM_EPSILON,
    layer_norm_fields,
    only_usual_heads,
    whole_rope,
)
from rkf.converters.families.gguf_rope import rope_fields, shortest
from rkf.converters.families.keys import activation, flag, number, optional_size, size, token, tokens
from rkf.converters.families.layout import Layout, renamed
from rkf.converters.families.windows import WINDOW
from rkf.model.program import MAX_LAYERS, Program


@dataclass(frozen=True, kw_only=True)
class Starcoder2Keys(DecoderKeys):
    vocab_size: int = size(49152)
    hidden_size: int = size(3072)
    intermediate_size: int = size(12288)
    num_hidden_layers: int = size(30, most=MAX_LAYERS)
    num_attention_heads: int = size(24)
    num_key_value_heads: int | None = optional_size(2)
    hidden_act: str = activation("gelu_pytorch_tanh")
    max_position_embeddings: int = size(4096)
    rms_norm_eps: float = number(1e-5, name="norm_epsilon")
    tie_word_embeddings: bool = flag(True)
    sliding_window: int | None = optional_size()
    use_bias: bool = flag(True)
    bos_token_id: int | None = token(50256)
    eos_token_id: tuple[int, ...] = tokens(50256)


def _program(config: Starcoder2Keys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    attends = attention(config, biases="qkvo" if config.use_bias else "", window=config.sliding_window)
    layer = pre_norm_layer(config, attends, ungated(config, bias=config.use_bias), style=LAYER_NORM)
    return assemble(config, [layer] * config.num_hidden_layers, (turns,), final_norm=LAYER_NORM)


def _layout(config: Starcoder2Keys) -> Layout:
    return renamed({"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"})


def _to_config(model: GgufModel) -> dict[str, Any]:
    own = model.own
    return {
        "norm_epsilon": shortest(own.get(LAYER_NORM_EPSILON)),
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": own.get(WINDOW) or None,
        **whole_rope(model),
    }


def _to_fields(config: Starcoder2Keys) -> GgufFields:
    """llama.cpp does not apply the window to this architecture; the field is for readers that do."""
    only_usual_heads(config)
    config.refuse(not config.use_bias, "use_bias", "true: llama.cpp needs biases here")
    own = {
        **layer_norm_fields(config),
        WINDOW: config.sliding_window,
    }
    return rope_fields(rope_scaling.whole(config), config.head_size).plus(own)


FAMILY = Family(
    name="starcoder2",
    class_name="Starcoder2ForCausalLM",
    keys=Starcoder2Keys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("starcoder2", _to_config, _to_fields, _layout, activation="gelu_tanh", ignored=(WINDOW,)),
)
