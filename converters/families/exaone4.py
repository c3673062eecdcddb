"""exaone4: EXAONE 4. A norm after each branch; beside layers with a window, those without have no rope."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import HeadNorm, Layer, assemble, attention, gated, post_norm_layer
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import only_usual_heads, whole_rope
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import number, optional_size, period, size, token, tokens
from rkf.converters.families.windows import WINDOW, Windowed, periodic, window_config, window_fields
from rkf.errors import SourceError, UnsupportedError
from rkf.model.program import Program

# llama.cpp recognises by the first the one model that has windows, in three of four layers, by default of the second.
_LAYERS_32B, _WINDOW_32B = 64, 4096
_ONLY_32B = f"llama.cpp has windows only in a model of {_LAYERS_32B} layers"


@dataclass(frozen=True, kw_only=True)
class Exaone4Keys(Windowed):
    vocab_size: int = size(102400)
    intermediate_size: int = size(16384)
    num_key_value_heads: int | None = optional_size(32)
    rms_norm_eps: float = number(1e-5)
    sliding_window_pattern: int | None = period(4)
    bos_token_id: int | None = token(0)
    eos_token_id: tuple[int, ...] = tokens(2)

    def __post_init__(self) -> None:
        if self.layer_types is None and (self.sliding_window is None or self.sliding_window_pattern is None):
            raise SourceError("layer_types: expected a list, as there is no sliding_window with a numeric pattern")
        super().__post_init__()

    @property
    def period(self) -> int:
        return self.sliding_window_pattern or 1


def _program(config: Exaone4Keys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    return assemble(config, (_layer(config, kind) for kind in config.kinds), (turns,))


def _layer(config: Exaone4Keys, kind: str) -> Layer:
    window = config.window(kind)
    turned = config.sliding_window is None or window is not None
    attends = attention(config, "x", head_norm=HeadNorm(config.rms_norm_eps), rope=0 if turned else None, window=window)
    return post_norm_layer(config, attends, gated(config, "x"))


def _to_config(model: GgufModel) -> dict[str, Any]:
    own = model.own
    if own["block_count"] == _LAYERS_32B:
        own = {WINDOW: _WINDOW_32B, **own}
    elif own.get(WINDOW):
        raise UnsupportedError(f"{WINDOW} is {own[WINDOW]}; {_ONLY_32B}")
    return {**window_config(own, period=4), **whole_rope(model)}


def _to_fields(config: Exaone4Keys) -> GgufFields:
    only_usual_heads(config)
    if config.sliding_window is not None and not _has_known_windows(config):
        raise UnsupportedError(f"sliding_window: {_ONLY_32B}, in three of four")
    return rope_fields(rope_scaling.whole(config), config.head_size).plus(window_fields(config))


def _has_known_windows(config: Exaone4Keys) -> bool:
    return config.num_hidden_layers == _LAYERS_32B and config.kinds == periodic(_LAYERS_32B, 4)


FAMILY = Family(
    name="exaone4",
    class_name="Exaone4ForCausalLM",
    keys=Exaone4Keys,
    program=_program,
    gguf=GgufForm("exaone4", _to_config, _to_fields, factors=True),
)
