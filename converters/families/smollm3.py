"""smollm3: SmolLM 3. A llama in which every fourth layer has no rope, and may have a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import assemble, attention, gated, pre_norm_layer
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import FULL, SLIDING, flag, number, optional_size, size, token, tokens
from rkf.converters.families.llama import unpermuted
from rkf.converters.families.roped_layers import INTERVAL, RopedLayers
from rkf.converters.families.windows import Windowed
from rkf.errors import UnsupportedError
from rkf.model.program import MAX_LAYERS, Program


@dataclass(frozen=True, kw_only=True)
class SmolLm3Keys(RopedLayers, Windowed):
    vocab_size: int = size(128256)
    hidden_size: int = size(2048)
    num_hidden_layers: int = size(36, most=MAX_LAYERS)
    num_attention_heads: int = size(16)
    num_key_value_heads: int | None = optional_size(4)
    max_position_embeddings: int = size(32768)
    tie_word_embeddings: bool = flag(True)
    rope_theta: float = number(2000000.0)
    attention_bias: bool = flag(False)
    mlp_bias: bool = flag(False)
    use_sliding_window: bool = flag(False)
    sliding_window: int | None = optional_size()
    bos_token_id: int | None = token(128000)
    eos_token_id: tuple[int, ...] = tokens(128001)

    @property
    def kinds(self) -> tuple[str, ...]:
        if self.layer_types is not None:
            return self.layer_types
        windowed = self.use_sliding_window and self.sliding_window is not None
        return tuple(SLIDING if windowed and not turns else FULL for turns in self.ropes)


def _program(config: SmolLm3Keys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    biases, feeds = "qkvo" if config.attention_bias else "", gated(config, bias=config.mlp_bias)
    layers = (
        pre_norm_layer(
            config, attention(config, biases=biases, rope=0 if turned else None, window=config.window(kind)), feeds
        )
        for turned, kind in zip(config.ropes, config.kinds, strict=True)
    )
    return assemble(config, layers, (turns,))


def _to_config(model: GgufModel) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in model.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in model.tensors,
        "no_rope_layer_interval": INTERVAL,
        **whole_rope(model),
    }


def _to_fields(config: SmolLm3Keys) -> GgufFields:
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    config.refuse(config.mlp_bias, "mlp_bias", "false: llama.cpp has no biases here")
    if SLIDING in config.kinds:
        raise UnsupportedError("layer_types: llama.cpp has no windows here; expected full attention in all layers")
    config.refuse_other_ropes()
    return rope_fields(rope_scaling.whole(config), config.head_size)


FAMILY = Family(
    name="smollm3",
    class_name="SmolLM3ForCausalLM",
    keys=SmolLm3Keys,
    program=_program,
    gguf=GgufForm("smollm3", _to_config, _to_fields, unpermuted),
)
