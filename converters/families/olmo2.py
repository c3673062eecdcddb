"""olmo2: OLMo 2. A norm after each branch instead of before it; norms of q and k over all heads together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import HeadNorm, assemble, attention, gated, post_norm_layer
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import only_usual_heads, whole_rope
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import flag, number, size, tokens
from rkf.model.program import Program


@dataclass(frozen=True, kw_only=True)
class Olmo2Keys(DecoderKeys):
    vocab_size: int = size(50304)
    rms_norm_eps: float = number(1e-5)
    attention_bias: bool = flag(False)
    eos_token_id: tuple[int, ...] = tokens(50279)


def _program(config: Olmo2Keys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    biases, head_norm = "qkvo" if config.attention_bias else "", HeadNorm(config.rms_norm_eps, whole=True)
    layer = post_norm_layer(config, attention(config, "x", biases=biases, head_norm=head_norm), gated(config, "x"))
    return assemble(config, [layer] * config.num_hidden_layers, (turns,))


def _to_config(model: GgufModel) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in model.tensors,
        **whole_rope(model),
    }


def _to_fields(config: Olmo2Keys) -> GgufFields:
    only_usual_heads(config)
    config.refuse(config.tie_word_embeddings, "tie_word_embeddings", "false: llama.cpp needs a separate head")
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    return rope_fields(rope_scaling.whole(config), config.head_size)


def _claims(own: Mapping[str, Any]) -> bool:
    return not own.get("attention.sliding_window")


FAMILY = Family(
    name="olmo2",
    class_name="Olmo2ForCausalLM",
    keys=Olmo2Keys,
    program=_program,
    gguf=GgufForm("olmo2", _to_config, _to_fields, claims=_claims),
)
