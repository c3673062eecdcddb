"""olmo3: OLMo 3. OLMo 2 with a window in three of four layers, whose rope is not scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import HeadNorm, Layer, assemble, attention, gated, post_norm_layer
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import head_size, only_usual_heads, only_whole_heads
from rkf.converters.families.gguf_rope import rope_config, rope_fields
from rkf.converters.families.keys import FULL, SLIDING, flag, number, size, tokens
from rkf.converters.families.windows import Windowed, window_config, window_fields
from rkf.errors import UnsupportedError
from rkf.model.program import Program

_THETA = 500000.0


@dataclass(frozen=True, kw_only=True)
class Olmo3Keys(Windowed):
    vocab_size: int = size(50304)
    rms_norm_eps: float = number(1e-5)
    rope_theta: float = number(_THETA)
    attention_bias: bool = flag(False)
    eos_token_id: tuple[int, ...] = tokens(50279)

    @property
    def ropes(self) -> dict[str, dict[str, Any]]:
        """Rope parameters by kind of layer. A top-level rope_theta reaches only the layers without a window."""
        return rope_scaling.by_kind(self, {FULL: self.rope_theta, SLIDING: _THETA})


def _program(config: Olmo3Keys) -> Program:
    ropes = rope_scaling.tables(config.ropes, config.kinds, config)
    numbers = {kind: number for number, kind in enumerate(ropes)}
    return assemble(config, (_layer(config, kind, numbers[kind]) for kind in config.kinds), tuple(ropes.values()))


def _layer(config: Olmo3Keys, kind: str, rope_number: int) -> Layer:
    attends = attention(
        config,
        "x",
        biases="qkvo" if config.attention_bias else "",
        head_norm=HeadNorm(config.rms_norm_eps, whole=True),
        rope=rope_number,
        window=config.window(kind),
    )
    return post_norm_layer(config, attends, gated(config, "x"))


def _to_config(model: GgufModel) -> dict[str, Any]:
    only_whole_heads(model.own, head_size(model))
    full = rope_config(model, head_size(model))
    sliding = {"rope_type": "default", "rope_theta": full["rope_theta"]}
    return {
        **window_config(model.own, period=4),
        **rope_scaling.spelt(full),  # as read by transformers 4
        "rope_parameters": {FULL: full, SLIDING: sliding},
    }


def _to_fields(config: Olmo3Keys) -> GgufFields:
    only_usual_heads(config)
    config.refuse(config.tie_word_embeddings, "tie_word_embeddings", "false: llama.cpp needs a separate head")
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    config.refuse(SLIDING not in config.kinds, "layer_types", f"at least one {SLIDING}, else a GGUF means OLMo 2")
    full, sliding = config.ropes[FULL], config.ropes[SLIDING]
    if sliding["rope_type"] != "default" or sliding["rope_theta"] != full["rope_theta"]:
        raise UnsupportedError(
            "rope_parameters: llama.cpp assumes one rope_theta, and no scaling in layers with a window"
        )
    return rope_fields(full, config.head_size).plus(window_fields(config))


def _claims(own: Mapping[str, Any]) -> bool:
    return bool(own.get("attention.sliding_window"))


FAMILY = Family(
    name="olmo3",
    class_name="Olmo3ForCausalLM",
    keys=Olmo3Keys,
    program=_program,
    gguf=GgufForm("olmo2", _to_config, _to_fields, claims=_claims),
)
