"""gpt_oss: gpt-oss. Sinks, windows in every other layer, experts with biases and clamped gates.

The stacks of a checkpoint are transposed and interleave gate and up; those in MXFP4 interleave the rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import Layer, assemble, attention, pre_norm_layer
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import head_size, only_whole_heads
from rkf.converters.families.gguf_experts import INNER, expert_config, expert_fields
from rkf.converters.families.gguf_rope import rope_config, rope_fields, stretch
from rkf.converters.families.keys import FULL, SLIDING, flag, number, optional_size, size, tokens
from rkf.converters.families.layout import Layout, Origin, as_named
from rkf.converters.families.layout_transforms import Transposed
from rkf.converters.families.windows import Windowed, always_windowed, one_rope, periodic, window_config
from rkf.errors import UnsupportedError
from rkf.model.ops import Experts, Route
from rkf.model.program import MAX_LAYERS, Program

_PERIOD = 2  # of windows; llama.cpp assumes it
# What the reference takes without rope_parameters.
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_ALPHA, _LIMIT = 1.702, 7.0


@dataclass(frozen=True, kw_only=True)
class GptOssKeys(Windowed):
    vocab_size: int = size(201088)
    hidden_size: int = size(2880)
    intermediate_size: int = size(2880)
    num_hidden_layers: int = size(36, most=MAX_LAYERS)
    num_attention_heads: int = size(64)
    num_key_value_heads: int | None = optional_size(8)
    head_dim: int = size(64)
    max_position_embeddings: int = size(131072)
    rms_norm_eps: float = number(1e-5)
    rope_theta: float = number(150000.0)
    attention_bias: bool = flag(True)
    sliding_window: int | None = optional_size(128)
    num_experts: int = size(128, aliases=("num_local_experts",), most=1 << 16)
    num_experts_per_tok: int = size(4)
    swiglu_alpha: float = number(_ALPHA)
    swiglu_limit: float = number(_LIMIT)
    eos_token_id: tuple[int, ...] = tokens()

    @property
    def period(self) -> int:
        return _PERIOD


def _program(config: GptOssKeys) -> Program:
    turns = rope_scaling.table(_rope(config), config)
    biases = "qkvo" if config.attention_bias else ""
    mixture = _mixture(config)
    layers = (
        pre_norm_layer(config, attention(config, biases=biases, window=config.window(kind), sinks=True), mixture)
        for kind in config.kinds
    )
    return assemble(config, layers, (turns,))


def _mixture(config: GptOssKeys) -> Layer:
    return (
        Route(
            src="h",
            dst="r",
            weight="mlp.router.weight",
            bias="mlp.router.bias",
            experts=config.num_experts,
            count=config.num_experts_per_tok,
            score="chosen",
        ),
        Experts(
            src="h",
            route="r",
            dst="d",
            gate="mlp.experts.gate_proj.weight",
            up="mlp.experts.up_proj.weight",
            down="mlp.experts.down_proj.weight",
            gate_bias="mlp.experts.gate_proj.bias",
            up_bias="mlp.experts.up_proj.bias",
            down_bias="mlp.experts.down_proj.bias",
            inner=config.intermediate_size,
            rows=config.hidden_size,
            act="silu",
            limit=config.swiglu_limit,
            alpha=config.swiglu_alpha,
            shift=1.0,
        ),
    )


def _rope(config: GptOssKeys) -> dict[str, Any]:
    given = config.rope_scaling or (_ROPE if config.rope_parameters is None else config.rope_parameters)
    return rope_scaling.whole_heads(rope_scaling.standard(dict(given), config))


def _layout(config: GptOssKeys) -> Layout:
    stack, inner = slice(0, config.num_experts), 2 * config.intermediate_size
    turn = {"gate_proj": slice(0, inner, 2), "up_proj": slice(1, inner, 2)}

    def layout(name: str) -> tuple[Origin, ...]:
        if not name.startswith("mlp.experts."):
            return as_named(name)
        matrix, kind = name.removeprefix("mlp.experts.").split(".")
        whole = "mlp.experts." + ("gate_up_proj" if matrix in turn else matrix)
        rows = (stack, turn[matrix]) if matrix in turn else ()
        if kind == "bias":
            return (Origin((f"{whole}_bias",), rows),)
        part = (stack, slice(0, config.hidden_size), turn[matrix]) if matrix in turn else ()
        return Origin((whole,), part, (Transposed(),)), Origin((f"{whole}_blocks",), rows)

    return layout


def _gguf_layout(config: GptOssKeys) -> Layout:
    return lambda name: as_named(f"{name}.weight" if name == "self_attn.sinks" else name)


def _to_config(model: GgufModel) -> dict[str, Any]:
    """A GGUF cannot say whether yarn's ramp is rounded. In the published models it is not; llama.cpp rounds it."""
    own = model.own
    one_rope(own)
    always_windowed(own)
    only_whole_heads(own, head_size(model))
    rope = rope_config(model, head_size(model))
    exact = rope | {"truncate": False} if rope["rope_type"] == "yarn" else rope
    return {
        **expert_config(own),
        **window_config(own, _PERIOD),
        "intermediate_size": own.get(INNER) or own["feed_forward_length"],
        **rope_scaling.spelt(exact),
    }


def _notes(own: Mapping[str, Any]) -> tuple[str, ...]:
    if own.get("rope.scaling.type") != "yarn" or stretch(own)[1] == 1:
        return ()
    return ("the edges of yarn's ramp are exact, as in the published models of gpt_oss; llama.cpp rounds them",)


def _to_fields(config: GptOssKeys) -> GgufFields:
    config.refuse(not config.attention_bias, "attention_bias", "true: llama.cpp has biases here")
    config.refuse(config.swiglu_alpha != _ALPHA, "swiglu_alpha", f"{_ALPHA}, which llama.cpp assumes")
    config.refuse(config.swiglu_limit != _LIMIT, "swiglu_limit", f"{_LIMIT}, which llama.cpp assumes")
    if config.kinds != periodic(config.num_hidden_layers, _PERIOD):
        raise UnsupportedError(f"layer_types: expected {SLIDING} and {FULL} in turn, which llama.cpp assumes")
    rope = _rope(config)
    if rope["rope_type"] == "yarn" and rope.get("truncate", True):
        raise UnsupportedError("truncate: True is not supported; a GGUF of this family stands for false")
    own = {
        **expert_fields(config.num_experts, config.num_experts_per_tok, config.intermediate_size),
        "attention.sliding_window": config.sliding_window,
    }
    return rope_fields(rope | {"truncate": True}, config.head_size).plus(own)


FAMILY = Family(
    name="gpt_oss",
    class_name="GptOssForCausalLM",
    keys=GptOssKeys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("gpt-oss", _to_config, _to_fields, _gguf_layout, notes=_notes),
)
