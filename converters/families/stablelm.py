"""stablelm: StableLM 3B and 2 1.6B. LayerNorm, rope in a quarter of a head, optionally both branches of one norm,
and norms of queries and keys of which each head has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import (
    LAYER_NORM,
    HeadNorm,
    assemble,
    attention,
    gated,
    parallel_layer,
    pre_norm_layer,
)
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import LAYER_NORM_EPSILON, layer_norm_fields, partial_rope
from rkf.converters.families.gguf_rope import rope_fields, shortest
from rkf.converters.families.keys import flag, number, optional_number, optional_size, size, token, tokens
from rkf.converters.families.layout import Layout, Origin, as_named
from rkf.converters.families.layout_transforms import Flattened
from rkf.model.program import Program


@dataclass(frozen=True, kw_only=True)
class StableLmKeys(DecoderKeys):
    vocab_size: int = size(50304)
    hidden_size: int = size(2560)
    intermediate_size: int = size(6912)
    num_key_value_heads: int | None = optional_size(32)
    max_position_embeddings: int = size(4096)
    rms_norm_eps: float = number(1e-5, name="layer_norm_eps")
    partial_rotary_factor: float | None = optional_number(0.25)
    use_qkv_bias: bool = flag(False)
    qk_layernorm: bool = flag(False)
    use_parallel_residual: bool = flag(False)
    bos_token_id: int | None = token(0)
    eos_token_id: tuple[int, ...] = tokens(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.usual_heads()


def _program(config: StableLmKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.parameters(config), config)
    norms = HeadNorm(config.rms_norm_eps, own=True, centred=True) if config.qk_layernorm else None
    attends = attention(config, biases="qkv" if config.use_qkv_bias else "", head_norm=norms)
    layer_of = parallel_layer if config.use_parallel_residual else pre_norm_layer
    layer = layer_of(config, attends, gated(config), style=LAYER_NORM)
    return assemble(config, [layer] * config.num_hidden_layers, (turns,), final_norm=LAYER_NORM)


def _heads(config: StableLmKeys) -> dict[str, int]:
    """The number of heads by the program's name of their norms."""
    return {"self_attn.q_norm.weight": config.num_attention_heads, "self_attn.k_norm.weight": config.kv_heads}


def _layout(config: StableLmKeys) -> Layout:
    def layout(name: str) -> tuple[Origin, ...]:
        heads = _heads(config).get(name)
        if heads is None:
            return as_named(name)
        module = name.replace("_norm.weight", "_layernorm.norms")
        return (Origin(tuple(f"{module}.{head}.weight" for head in range(heads)), joined=True),)

    return layout


def _gguf_layout(config: StableLmKeys) -> Layout:
    def layout(name: str) -> tuple[Origin, ...]:
        heads = _heads(config).get(name)
        return as_named(name) if heads is None else (Origin((name,), steps=(Flattened(heads),)),)

    return layout


def _to_config(model: GgufModel) -> dict[str, Any]:
    own = model.own
    return {
        "layer_norm_eps": shortest(own.get(LAYER_NORM_EPSILON)),
        "use_qkv_bias": "blk.0.attn_q.bias" in model.tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in model.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in model.tensors,
        **partial_rope(model),
    }


def _to_fields(config: StableLmKeys) -> GgufFields:
    config.refuse(config.tie_word_embeddings, "tie_word_embeddings", "false: llama.cpp needs a separate head")
    own = {**layer_norm_fields(config), "use_parallel_residual": config.use_parallel_residual}
    return rope_fields(rope_scaling.parameters(config), config.head_size).plus(own)


FAMILY = Family(
    name="stablelm",
    class_name="StableLmForCausalLM",
    keys=StableLmKeys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("stablelm", _to_config, _to_fields, _gguf_layout),
)
