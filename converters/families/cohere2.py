"""cohere2: Command R7B and A. LayerNorm that both branches read; rope of neighbours in layers with a window alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import Layer, NormStyle, assemble, attention, gated, parallel_layer
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import LAYER_NORM_EPSILON, layer_norm_fields, only_usual_heads, whole_rope
from rkf.converters.families.gguf_rope import rope_fields, shortest
from rkf.converters.families.keys import SLIDING, flag, number, size, token, tokens
from rkf.converters.families.windows import Windowed, always_windowed, periodic, window_config
from rkf.errors import UnsupportedError
from rkf.model.program import MAX_LAYERS, Program

_STYLE = NormStyle(centred=True)
_PERIOD = 4


@dataclass(frozen=True, kw_only=True)
class Cohere2Keys(Windowed):
    vocab_size: int = size(256000)
    hidden_size: int = size(8192)
    intermediate_size: int = size(22528)
    num_hidden_layers: int = size(40, most=MAX_LAYERS)
    num_attention_heads: int = size(64)
    max_position_embeddings: int = size(8192)
    rms_norm_eps: float = number(1e-5, name="layer_norm_eps")
    tie_word_embeddings: bool = flag(True)
    attention_bias: bool = flag(False)
    logit_scale: float = number(0.0625)
    sliding_window_pattern: int = size(_PERIOD)
    bos_token_id: int | None = token(5)
    eos_token_id: tuple[int, ...] = tokens(255001)

    @property
    def period(self) -> int:
        return self.sliding_window_pattern


def _program(config: Cohere2Keys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    layers = (_layer(config, kind) for kind in config.kinds)
    return assemble(config, layers, (turns,), final_norm=_STYLE, logit_scale=config.logit_scale)


def _layer(config: Cohere2Keys, kind: str) -> Layer:
    attends = attention(
        config,
        biases="qkvo" if config.attention_bias else "",
        rope=0 if kind == SLIDING else None,
        pairs="neighbours",
        window=config.window(kind),
    )
    return parallel_layer(config, attends, gated(config), _STYLE)


def _to_config(model: GgufModel) -> dict[str, Any]:
    own = model.own
    always_windowed(own)
    return {
        "layer_norm_eps": shortest(own.get(LAYER_NORM_EPSILON)),
        "logit_scale": shortest(own.get("logit_scale")),
        **window_config(own, _PERIOD),
        **whole_rope(model),
    }


def _to_fields(config: Cohere2Keys) -> GgufFields:
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    config.refuse(not config.tie_word_embeddings, "tie_word_embeddings", "true: llama.cpp has no separate head here")
    only_usual_heads(config)
    if config.kinds != periodic(config.num_hidden_layers, _PERIOD):
        raise UnsupportedError(f"layer_types: llama.cpp assumes a window in every layer but each {_PERIOD}th")
    own = {
        **layer_norm_fields(config),
        "attention.sliding_window": config.sliding_window,
        "logit_scale": config.logit_scale,
    }
    return rope_fields(rope_scaling.whole(config), config.head_size).plus(own)


FAMILY = Family(
    name="cohere2",
    class_name="Cohere2ForCausalLM",
    keys=Cohere2Keys,
    program=_program,
    gguf=GgufForm("cohere2", _to_config, _to_fields),
)
