"""qwen3_5_text: Qwen 3.5, dense, text only. Three layers of linear attention (gated delta rule) to one of attention.

Norms have (1 + w), but for the one after the delta rule. From a checkpoint with vision, only the decoder is converted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import (
    HeadNorm,
    Layer,
    NormStyle,
    assemble,
    attention,
    gated,
    linear,
    pre_norm_layer,
)
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel, Wrapper
from rkf.converters.families.gguf_config import RMS_EPSILON, head_size
from rkf.converters.families.gguf_rope import rope_config, rope_fields
from rkf.converters.families.keys import FULL, LINEAR, flag, layer_types, optional_number, optional_size, size
from rkf.converters.families.layout import Layout, Origin, as_named
from rkf.converters.families.layout_transforms import Added, MinusExp, Regrouped, Squeezed, Transform
from rkf.errors import SourceError, UnsupportedError
from rkf.model.ops import Conv, Delta, Gate, Norm
from rkf.model.program import Program

_RECURRENT, _SECTIONS = "attention.recurrent_layers", "rope.dimension_sections"
_INTERVAL = 4
# llama.cpp takes the epsilon of the layers for keys and queries of linear attention too, where the reference has 1e-6.
# Up to this one, logits of a small random model differ by at most 4e-5 of the largest.
_EPSILON = 1e-5
_STYLE = NormStyle(offset=1.0)
_DELTA_NORM = "linear_attn.norm.weight"


@dataclass(frozen=True, kw_only=True)
class Qwen35Keys(DecoderKeys):
    vocab_size: int = size(248320)
    intermediate_size: int = size(12288)
    num_attention_heads: int = size(16)
    num_key_value_heads: int | None = optional_size(4)
    head_dim: int = size(256)
    max_position_embeddings: int = size(32768)
    partial_rotary_factor: float | None = optional_number(0.25)
    attention_bias: bool = flag(False)
    layer_types: tuple[str, ...] | None = layer_types(FULL, LINEAR)
    full_attention_interval: int = size(_INTERVAL)
    linear_conv_kernel_dim: int = size(4)
    linear_key_head_dim: int = size(128)
    linear_value_head_dim: int = size(128)
    linear_num_key_heads: int = size(16)
    linear_num_value_heads: int = size(32)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.kinds) != self.num_hidden_layers:
            raise SourceError(f"layer_types: expected {self.num_hidden_layers} words, got {len(self.kinds)}")
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise SourceError(
                f"linear_num_value_heads: expected a multiple of linear_num_key_heads ({self.linear_num_key_heads}), "
                f"got {self.linear_num_value_heads}"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer, as a word of layer_types."""
        return self.layer_types or periodic(self.num_hidden_layers, self.full_attention_interval)

    @property
    def rope(self) -> dict[str, Any]:
        """For text, the interleaved positions of mrope_section are all the same, so that it changes nothing."""
        return rope_scaling.parameters(self)


def periodic(layers: int, interval: int) -> tuple[str, ...]:
    """Kinds of layers of which the last of each interval has attention."""
    return tuple(LINEAR if (number + 1) % interval else FULL for number in range(layers))


def _program(config: Qwen35Keys) -> Program:
    return program(config, gated(config))


def program(config: Qwen35Keys, feeds: Layer) -> Program:
    turns = rope_scaling.table(config.rope, config)
    attends = {
        FULL: attention(
            config,
            biases="qkvo" if config.attention_bias else "",
            head_norm=HeadNorm(config.rms_norm_eps, offset=_STYLE.offset),
            gate=True,
        ),
        LINEAR: _delta(config),
    }
    layers = (pre_norm_layer(config, attends[kind], feeds, style=_STYLE) for kind in config.kinds)
    ropes = (turns,) if FULL in config.kinds else ()
    return assemble(config, layers, ropes, final_norm=_STYLE)


def _delta(config: Qwen35Keys) -> Layer:
    """Linear attention on h, written to o."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return (
        linear("h", "c", "linear_attn.in_proj_qkv", 2 * keys + values, False),
        linear("h", "z", "linear_attn.in_proj_z", values, False),
        linear("h", "b", "linear_attn.in_proj_b", config.linear_num_value_heads, False),
        linear("h", "a", "linear_attn.in_proj_a", config.linear_num_value_heads, False),
        Conv(
            src="c",
            dst="c",
            weight="linear_attn.conv1d.weight",
            taps=config.linear_conv_kernel_dim,
            act=config.hidden_act,
        ),
        Delta(
            src="c",
            a="a",
            b="b",
            dst="y",
            a_log="linear_attn.A_log",
            dt_bias="linear_attn.dt_bias",
            key_heads=config.linear_num_key_heads,
            value_heads=config.linear_num_value_heads,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
        ),
        Norm(src="y", dst="y", weight=_DELTA_NORM, epsilon=config.rms_norm_eps, group=config.linear_value_head_dim),
        Gate(a="z", b="y", dst="y", act="silu"),
        linear("y", "o", "linear_attn.out_proj", config.hidden_size, False),
    )


def layout(config: Qwen35Keys) -> Layout:
    """q_proj has the queries of a head, then its gate."""
    width = config.head_size
    parts = {"q_proj": slice(0, width), "gate_proj": slice(width, 2 * width)}

    def origins(name: str) -> tuple[Origin, ...]:
        matrix, _, kind = name.removeprefix("self_attn.").partition(".")
        if name.startswith("self_attn.") and matrix in parts:
            whole = f"self_attn.q_proj.{kind}"
            return (Origin((whole,), (parts[matrix],), heads=config.num_attention_heads),)
        if name == "linear_attn.conv1d.weight":
            return (Origin((name,), steps=(Squeezed(1),)),)
        return as_named(name)

    return origins


def gguf_layout(config: Qwen35Keys) -> Layout:
    """llama.cpp's converter adds 1 to norms, and gives the copies of a key head's value heads another order."""
    own, names = layout(config), {"linear_attn.dt_bias": "linear_attn.dt_proj.bias"}

    def origins(name: str) -> tuple[Origin, ...]:
        if name == "linear_attn.conv1d.weight":
            return (Origin((name,), steps=_regrouped(config, name)),)
        if name.startswith("linear_attn.") and name != _DELTA_NORM:
            return (Origin((names.get(name, name),), steps=_regrouped(config, name)),)
        if name.endswith("norm.weight") and name != _DELTA_NORM:
            return (Origin((name,), steps=(Added(-1.0),)),)
        return own(name)

    return origins


def _regrouped(config: Qwen35Keys, name: str) -> tuple[Transform, ...]:
    groups, copies = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    with_keys = name.split(".")[1] in ("in_proj_qkv", "conv1d")
    steps: tuple[Transform, ...] = (MinusExp(),) if name == "linear_attn.A_log" else ()
    if copies == 1:
        return steps
    start = 2 * groups * config.linear_key_head_dim if with_keys else 0
    return (*steps, Regrouped(groups, copies, axis=1 if "out_proj" in name else 0, start=start))


def _refuse_still_pairs(sections: Sequence[int], pairs: int, key: str) -> None:
    """Refuse sections of rope that leave pairs unturned in llama.cpp. For text, three of its four positions are that of
    the token and the fourth is 0, which a pair gets unless its section reaches it. Source: `ggml_mrope_cache_init` in
    ops.cpp. The reference gives each such pair the first position.
    """
    reach = min(pairs, sum(sections))
    if reach < 1 or any(-(-(reach - number) // 3) > sections[number] for number in range(3)):
        raise UnsupportedError(f"{key}: {sections} is not supported: llama.cpp would leave some of {pairs} pairs still")


def to_config(model: GgufModel) -> dict[str, Any]:
    own, width = model.own, head_size(model)
    turned = own.get("rope.dimension_count", width)
    if _SECTIONS in own:
        _refuse_still_pairs([*map(int, own[_SECTIONS]), 0, 0, 0][:4], turned // 2, _SECTIONS)
    values = own.get("ssm.time_step_rank", 1)
    recurrent = own.get(_RECURRENT)  # newer files have it; it also counts layers of prediction
    kinds = None if recurrent is None else [LINEAR if each else FULL for each in recurrent[: own["block_count"]]]
    return {
        "full_attention_interval": own.get("full_attention_interval", _INTERVAL),
        "layer_types": kinds,
        "linear_conv_kernel_dim": own.get("ssm.conv_kernel"),
        "linear_key_head_dim": own.get("ssm.state_size"),
        "linear_value_head_dim": own.get("ssm.inner_size", 0) // values,
        "linear_num_key_heads": own.get("ssm.group_count"),
        "linear_num_value_heads": values,
        **rope_scaling.spelt(rope_config(model, width) | {"partial_rotary_factor": turned / width}),
    }


def notes(own: Mapping[str, Any]) -> tuple[str, ...]:
    if own.get(RMS_EPSILON, 0) <= np.float32(_EPSILON):
        return ()
    return (
        f"{RMS_EPSILON} is of the layers' norms alone, as in the reference; llama.cpp takes it in linear attention too",
    )


def to_fields(config: Qwen35Keys) -> GgufFields:
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    config.refuse(
        config.rms_norm_eps > _EPSILON, "rms_norm_eps", f"at most {_EPSILON:g}: llama.cpp has one for all norms"
    )
    widths = config.linear_value_head_dim != config.linear_key_head_dim
    config.refuse(widths, "linear_value_head_dim", f"{config.linear_key_head_dim}, the width of keys, as in llama.cpp")
    interval = next((number + 1 for number, kind in enumerate(config.kinds) if kind == FULL), len(config.kinds) + 1)
    if config.kinds != periodic(config.num_hidden_layers, interval):
        raise UnsupportedError(f"layer_types: a GGUF can store {FULL} only at a fixed interval")
    found = rope_fields(config.rope, config.head_size)
    pairs = int(found.own["rope.dimension_count"]) // 2
    thirds = [-(-(pairs - number) // 3) for number in range(3)]
    sections = [*config.rope.get("mrope_section", thirds), 0][:4]
    _refuse_still_pairs(sections, pairs, "mrope_section")
    own = {
        _SECTIONS: sections,
        "full_attention_interval": interval,
        _RECURRENT: [kind == LINEAR for kind in config.kinds],
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
    }
    return found.plus(own)


def wrapper(model_type: str) -> Wrapper:
    return Wrapper(
        model_type=model_type,
        prefixes=("model.language_model.",),
        dropped=("model.visual.", "mtp."),
        tied=False,
    )


FAMILY = Family(
    name="qwen3_5_text",
    class_name="Qwen3_5ForCausalLM",
    keys=Qwen35Keys,
    program=_program,
    layout=layout,
    gguf=GgufForm("qwen35", to_config, to_fields, gguf_layout, notes=notes),
    wrapper=wrapper("qwen3_5"),
    unused=lambda config, name: name.startswith("mtp."),
)
