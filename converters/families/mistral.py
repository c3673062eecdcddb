"""mistral: a llama without biases, optionally with a window in all layers. llama.cpp has no own name for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import assemble, attention, gated, pre_norm_layer
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel, Wrapper
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import optional_size, size, token, tokens
from rkf.converters.families.llama import unpermuted
from rkf.converters.families.windows import WINDOW
from rkf.model.program import Program

# Mistral Small 3 and Ministral 3 with vision; only the decoder is converted.
WRAPPER = Wrapper(
    model_type="mistral3",
    prefixes=("language_model.model.", "model.language_model."),
    dropped=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    tied=True,
)


@dataclass(frozen=True, kw_only=True)
class MistralKeys(DecoderKeys):
    intermediate_size: int = size(14336)
    num_key_value_heads: int | None = optional_size(8)
    max_position_embeddings: int = size(131072)
    sliding_window: int | None = optional_size(4096)
    bos_token_id: int | None = token(1)
    eos_token_id: tuple[int, ...] = tokens(2)


def _program(config: MistralKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    layer = pre_norm_layer(config, attention(config, window=config.sliding_window), gated(config))
    return assemble(config, [layer] * config.num_hidden_layers, (turns,))


def _to_config(model: GgufModel) -> dict[str, Any]:
    window = model.own[WINDOW]
    return {"sliding_window": window, **whole_rope(model)}


def _to_fields(config: MistralKeys) -> GgufFields:
    """llama.cpp does not apply the window to this architecture; the field is for readers that do."""
    return rope_fields(rope_scaling.whole(config), config.head_size).plus({WINDOW: config.sliding_window})


def _claims(own: Mapping[str, Any]) -> bool:
    return bool(own.get(WINDOW)) and not own.get("expert_count")


FAMILY = Family(
    name="mistral",
    class_name="MistralForCausalLM",
    keys=MistralKeys,
    program=_program,
    gguf=GgufForm("llama", _to_config, _to_fields, unpermuted, _claims, ignored=(WINDOW,), factors=True),
    wrapper=WRAPPER,
)
