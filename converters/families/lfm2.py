"""lfm2: LFM2, dense. Layers of attention and of short convolution, each followed by a gated unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import HeadNorm, Layer, assemble, attention, gated, linear, pre_norm_layer
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.expert_layout import renamed
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import RMS_EPSILON, whole_rope
from rkf.converters.families.gguf_rope import rope_fields, shortest
from rkf.converters.families.keys import (
    CONV,
    FULL,
    flag,
    ignored,
    layer_numbers,
    layer_types,
    number,
    optional_size,
    size,
    token,
    tokens,
)
from rkf.converters.families.layout import Layout, Origin
from rkf.converters.families.layout_transforms import Squeezed
from rkf.converters.families.windows import WINDOW
from rkf.errors import SourceError, UnsupportedError
from rkf.model.ops import Conv, Gate
from rkf.model.program import Program

# The program's names -> those of a checkpoint.
NAMES = {
    "input_layernorm.": "operator_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "self_attn.o_proj.": "self_attn.out_proj.",
    "self_attn.q_norm.": "self_attn.q_layernorm.",
    "self_attn.k_norm.": "self_attn.k_layernorm.",
    "mlp.gate_proj.": "feed_forward.w1.",
    "mlp.up_proj.": "feed_forward.w3.",
    "mlp.down_proj.": "feed_forward.w2.",
    "model.norm.": "model.embedding_norm.",
}
_PARTS = ("b_proj", "c_proj", "v_proj")  # of conv.in_proj, in order


@dataclass(frozen=True, kw_only=True)
class Lfm2BaseKeys(DecoderKeys):
    """Keys of the dense models and of the mixtures."""

    vocab_size: int = size(65536)
    num_key_value_heads: int | None = optional_size(8)
    hidden_act: str = ignored("silu")
    max_position_embeddings: int = size(128000)
    rms_norm_eps: float = number(1e-5, name="norm_eps")
    rope_theta: float = number(1000000.0)
    tie_word_embeddings: bool = flag(True, name="tie_embedding", aliases=("tie_word_embeddings",))
    conv_bias: bool = flag(False)
    conv_L_cache: int = size(3)
    layer_types: tuple[str, ...] | None = layer_types(FULL, CONV)
    bos_token_id: int | None = token(1)
    eos_token_id: tuple[int, ...] = tokens(2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.kinds) != self.num_hidden_layers:
            raise SourceError(f"layer_types: expected {self.num_hidden_layers} words, got {len(self.kinds)}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer, as a word of layer_types."""
        return self.layer_types or ()


@dataclass(frozen=True, kw_only=True)
class Lfm2Keys(Lfm2BaseKeys):
    hidden_size: int = size(2560)
    intermediate_size: int = size(12288, name="block_ff_dim", aliases=("intermediate_size",))
    block_multiple_of: int = size(256)
    block_ffn_dim_multiplier: float = number(1.0)
    block_auto_adjust_ff_dim: bool = flag(True)
    full_attn_idxs: tuple[int, ...] | None = layer_numbers(or_null=True)

    @property
    def kinds(self) -> tuple[str, ...]:
        if self.layer_types is not None:
            return self.layer_types
        full = range(self.num_hidden_layers) if self.full_attn_idxs is None else self.full_attn_idxs
        return tuple(FULL if number in full else CONV for number in range(self.num_hidden_layers))

    @property
    def inner(self) -> int:
        """The width of the gated units: two thirds of intermediate_size, rounded up, if it is adjusted."""
        if not self.block_auto_adjust_ff_dim:
            return self.intermediate_size
        found = int(self.block_ffn_dim_multiplier * int(2 * self.intermediate_size / 3))
        return -(-found // self.block_multiple_of) * self.block_multiple_of


def _program(config: Lfm2Keys) -> Program:
    return program(config, [gated(config, inner=config.inner)] * config.num_hidden_layers)


def program(config: Lfm2BaseKeys, feeds: list[Layer]) -> Program:
    """feeds: the part of each layer after attention or convolution."""
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    first = {FULL: attention(config, head_norm=HeadNorm(config.rms_norm_eps)), CONV: _convolution(config)}
    layers = (pre_norm_layer(config, first[kind], feed) for kind, feed in zip(config.kinds, feeds, strict=True))
    return assemble(config, layers, (turns,) if FULL in config.kinds else ())


def _convolution(config: Lfm2BaseKeys) -> Layer:
    """A product, a short convolution of it, and one more product; written to o."""
    bias = config.conv_bias
    b, c, v = (linear("h", part[0], f"conv.{part}", config.hidden_size, bias) for part in _PARTS)
    return (
        b,
        v,
        Gate(a=b.dst, b=v.dst, dst="s", act="identity"),
        Conv(
            src="s",
            dst="s",
            weight="conv.conv.weight",
            bias="conv.conv.bias" if bias else None,
            taps=config.conv_L_cache,
        ),
        c,
        Gate(a=c.dst, b="s", dst="s", act="identity"),
        linear("s", "o", "conv.out_proj", config.hidden_size, bias),
    )


def layout(config: Lfm2BaseKeys) -> Layout:
    """The three inputs of a convolution are one matrix, in order."""
    return _with_convolution(config, renamed(NAMES), (Squeezed(1),))


def gguf_layout(config: Lfm2BaseKeys) -> Layout:
    return _with_convolution(config, renamed({"model.norm.": "model.embedding_norm."}), ())


def _with_convolution(config: Lfm2BaseKeys, rest: Layout, kernel: tuple[Squeezed, ...]) -> Layout:
    width = config.hidden_size

    def origins(name: str) -> tuple[Origin, ...]:
        _, part, kind = name.split(".", 2) if name.startswith("conv.") else ("", "", "")
        if part in _PARTS:
            start = _PARTS.index(part) * width
            return (Origin((f"conv.in_proj.{kind}",), (slice(start, start + width),)),)
        if name == "conv.conv.weight":
            return (Origin((name,), steps=kernel),)
        return rest(name)

    return origins


def _to_config(model: GgufModel) -> dict[str, Any]:
    """A GGUF has the adjusted width."""
    if model.own.get(WINDOW):
        raise UnsupportedError(f"{WINDOW} is {model.own[WINDOW]}, expected none in this architecture")
    return to_config(model) | {"block_auto_adjust_ff_dim": False}


def to_config(model: GgufModel) -> dict[str, Any]:
    """A layer of convolution has 0 heads of keys."""
    own = model.own
    heads = np.broadcast_to(own.get("attention.head_count_kv", own["attention.head_count"]), own["block_count"])
    return {
        "num_key_value_heads": int(heads.max()),
        "layer_types": [FULL if each else CONV for each in heads],
        "norm_eps": shortest(own[RMS_EPSILON]),
        "conv_L_cache": own.get("shortconv.l_cache"),
        **whole_rope(model),
    }


def _to_fields(config: Lfm2Keys) -> GgufFields:
    return to_fields(config).plus({"feed_forward_length": config.inner})


def to_fields(config: Lfm2BaseKeys) -> GgufFields:
    config.refuse(config.conv_bias, "conv_bias", "false: llama.cpp has no biases here")
    own = {
        "attention.head_count_kv": [config.kv_heads if kind == FULL else 0 for kind in config.kinds],
        "shortconv.l_cache": config.conv_L_cache,
    }
    return rope_fields(rope_scaling.whole(config), config.head_size).plus(own)


FAMILY = Family(
    name="lfm2",
    class_name="Lfm2ForCausalLM",
    keys=Lfm2Keys,
    program=_program,
    layout=layout,
    gguf=GgufForm("lfm2", _to_config, _to_fields, gguf_layout),
)
