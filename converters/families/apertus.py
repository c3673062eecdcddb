"""apertus: Apertus. A llama with norms of q and k, and a feed-forward part without a gate, activated by xIELU.

The activation has four numbers a layer; a GGUF has them as fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import HeadNorm, Layer, assemble, attention, linear, pre_norm_layer, ungated
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import activation, flag, number, size, token, tokens
from rkf.converters.families.layout import Layout, Origin, renamed
from rkf.converters.families.layout_transforms import Scalar
from rkf.model.ops import Gate
from rkf.model.program import Program

_XIELU = "xielu"
_ALPHA_P, _ALPHA_N, _BETA, _EPS = (f"mlp.act_fn.{part}" for part in ("alpha_p", "alpha_n", "beta", "eps"))
_NAMES = {"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"}
# What the reference takes without rope_parameters.
_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12000000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


@dataclass(frozen=True, kw_only=True)
class ApertusKeys(DecoderKeys):
    vocab_size: int = size(131072)
    intermediate_size: int = size(14336)
    hidden_act: str = activation(_XIELU, own=_XIELU)
    max_position_embeddings: int = size(65536)
    rms_norm_eps: float = number(1e-5)
    rope_theta: float = number(12000000.0)
    attention_bias: bool = flag(False)
    bos_token_id: int | None = token(1)
    eos_token_id: tuple[int, ...] = tokens(2)


def _program(config: ApertusKeys) -> Program:
    turns = rope_scaling.table(_rope(config), config)
    biases, norms = "qkvo" if config.attention_bias else "", HeadNorm(config.rms_norm_eps)
    attends = attention(config, biases=biases, head_norm=norms)
    feeds = _curved(config) if config.hidden_act == _XIELU else ungated(config)
    return assemble(config, [pre_norm_layer(config, attends, feeds)] * config.num_hidden_layers, (turns,))


def _curved(config: ApertusKeys) -> Layer:
    return (
        linear("h", "up", "mlp.up_proj", config.intermediate_size, False),
        Gate(a="up", dst="m", act=_XIELU, alpha_p=_ALPHA_P, alpha_n=_ALPHA_N, beta=_BETA, eps=_EPS),
        linear("m", "d", "mlp.down_proj", config.hidden_size, False),
    )


def _rope(config: ApertusKeys) -> dict[str, Any]:
    given = config.rope_scaling or (_ROPE if config.rope_parameters is None else config.rope_parameters)
    return rope_scaling.whole_heads(rope_scaling.standard(dict(given), config))


def _layout(config: ApertusKeys) -> Layout:
    rest = renamed(_NAMES)
    return lambda name: (Origin((name,), steps=(Scalar(),)),) if name in (_BETA, _EPS) else rest(name)


def _to_config(model: GgufModel) -> dict[str, Any]:
    return {"hidden_act": _XIELU, **whole_rope(model)}


def _to_fields(config: ApertusKeys) -> GgufFields:
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    return rope_fields(_rope(config), config.head_size)


FAMILY = Family(
    name="apertus",
    class_name="ApertusForCausalLM",
    keys=ApertusKeys,
    program=_program,
    layout=_layout,
    gguf=GgufForm(
        "apertus",
        _to_config,
        _to_fields,
        lambda config: renamed(_NAMES),
        activation=_XIELU,
        numbers={name: name.replace("mlp.act_fn", _XIELU) for name in (_ALPHA_P, _ALPHA_N, _BETA, _EPS)},
        factors=True,
    ),
)
