"""mistral: a llama without biases, optionally with a window in all layers or some. llama.cpp has no own name for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import assemble, attention, gated, pre_norm_layer
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel, Wrapper
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import FULL, SLIDING, optional_size, size, token, tokens
from rkf.converters.families.llama import unpermuted
from rkf.converters.families.windows import WINDOW, Windowed
from rkf.errors import UnsupportedError
from rkf.model.program import Program

# Mistral Small 3 and Ministral 3 with vision; only the decoder is converted.
WRAPPER = Wrapper(
    model_type="mistral3",
    prefixes=("language_model.model.", "model.language_model."),
    dropped=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    tied=True,
)


@dataclass(frozen=True, kw_only=True)
class MistralKeys(Windowed):
    intermediate_size: int = size(14336)
    num_key_value_heads: int | None = optional_size(8)
    max_position_embeddings: int = size(131072)
    bos_token_id: int | None = token(1)
    eos_token_id: tuple[int, ...] = tokens(2)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Without layer_types, the window is that of every layer."""
        every = FULL if self.sliding_window is None else SLIDING
        return (every,) * self.num_hidden_layers if self.layer_types is None else self.layer_types


def _program(config: MistralKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    layers = (
        pre_norm_layer(config, attention(config, window=config.window(kind)), gated(config)) for kind in config.kinds
    )
    return assemble(config, layers, (turns,))


def _to_config(model: GgufModel) -> dict[str, Any]:
    window = model.own[WINDOW]
    return {"sliding_window": window, **whole_rope(model)}


def _to_fields(config: MistralKeys) -> GgufFields:
    """llama.cpp does not apply the window to this architecture; the field is for readers that do."""
    windows = {config.window(kind) for kind in config.kinds}
    if len(windows) > 1:
        raise UnsupportedError("layer_types: a GGUF of this family cannot store a window for only some layers")
    return rope_fields(rope_scaling.whole(config), config.head_size).plus({WINDOW: windows.pop()})


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
