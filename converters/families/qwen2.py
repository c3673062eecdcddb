"""qwen2: Qwen 2 and 2.5. Biases of q, k and v; optionally a window in the upper layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import assemble, attention, gated, pre_norm_layer
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import (
    FULL,
    SLIDING,
    count,
    flag,
    layer_types,
    optional_count,
    optional_size,
    size,
)
from rkf.converters.families.windows import WINDOW, used_window
from rkf.errors import SourceError, UnsupportedError
from rkf.model.program import Program


@dataclass(frozen=True, kw_only=True)
class QwenKeys(DecoderKeys):
    """Keys of Qwen 2 and 3."""

    vocab_size: int = size(151936)
    intermediate_size: int = size(22016)
    num_key_value_heads: int | None = optional_size(32)
    max_position_embeddings: int = size(32768)
    use_sliding_window: bool = flag(False)
    sliding_window: int | None = optional_count(4096)
    max_window_layers: int = count(28)
    layer_types: tuple[str, ...] | None = layer_types()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise SourceError(f"layer_types: expected {self.num_hidden_layers} words, got {len(self.layer_types)}")
        if self.window is None and SLIDING in (self.layer_types or ()):
            raise SourceError(
                f"layer_types: {SLIDING} expects a number as sliding_window and use_sliding_window: true beside it"
            )

    @property
    def window(self) -> int | None:
        """The window of the layers that have one."""
        return used_window(self.use_sliding_window, self.sliding_window)

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer, None for full attention."""
        kinds = self.layer_types or [
            SLIDING if number >= self.max_window_layers else FULL for number in range(self.num_hidden_layers)
        ]
        return [self.window if kind == SLIDING else None for kind in kinds]

    @property
    def rope(self) -> dict[str, Any]:
        return rope_scaling.whole(self)


def _program(config: QwenKeys) -> Program:
    turns = rope_scaling.table(config.rope, config)
    layers = (
        pre_norm_layer(config, attention(config, biases="qkv", window=window), gated(config))
        for window in config.windows
    )
    return assemble(config, layers, (turns,))


def to_config(model: GgufModel) -> dict[str, Any]:
    """A GGUF of these models does not say which layers have a window; if it has one, it applies to every layer."""
    window = model.own.get(WINDOW) or None
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": 0,
        **whole_rope(model),
    }


def to_fields(config: QwenKeys) -> GgufFields:
    windows = set(config.windows)
    if len(windows) > 1:
        raise UnsupportedError("layer_types: a GGUF of this family cannot store a window for only some layers")
    return rope_fields(config.rope, config.head_size).plus({WINDOW: windows.pop()})


FAMILY = Family(
    name="qwen2",
    class_name="Qwen2ForCausalLM",
    keys=QwenKeys,
    program=_program,
    gguf=GgufForm("qwen2", to_config, to_fields, ignored=(WINDOW,)),
)
