"""llama: Llama 1 to 3, and the many models of the same structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import assemble, attention, gated, pre_norm_layer
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import flag, token, tokens
from rkf.converters.families.layout import Layout, Origin, as_named
from rkf.converters.families.layout_transforms import Unpermuted
from rkf.model.program import Program


@dataclass(frozen=True, kw_only=True)
class LlamaKeys(DecoderKeys):
    attention_bias: bool = flag(False)
    mlp_bias: bool = flag(False)
    bos_token_id: int | None = token(1)
    eos_token_id: tuple[int, ...] = tokens(2)


def _program(config: LlamaKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    layer = pre_norm_layer(
        config,
        attention(config, biases="qkvo" if config.attention_bias else ""),
        gated(config, bias=config.mlp_bias),
    )
    return assemble(config, [layer] * config.num_hidden_layers, (turns,))


def _to_config(model: GgufModel) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in model.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in model.tensors,
        **whole_rope(model),
    }


def _to_fields(config: LlamaKeys) -> GgufFields:
    return rope_fields(rope_scaling.whole(config), config.head_size)


def unpermuted(config: DecoderKeys) -> Layout:
    """ggml's "normal" rope rotates neighbours, so llama.cpp's converter permutes the rows of q and k."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.kv_heads}

    def layout(name: str) -> tuple[Origin, ...]:
        found = heads.get(name.removeprefix("self_attn.").split(".")[0])
        return as_named(name) if found is None else (Origin((name,), steps=(Unpermuted(found),)),)

    return layout


def _claims(own: Mapping[str, Any]) -> bool:
    return not own.get("attention.sliding_window") and not own.get("expert_count")


FAMILY = Family(
    name="llama",
    class_name="LlamaForCausalLM",
    keys=LlamaKeys,
    program=_program,
    gguf=GgufForm("llama", _to_config, _to_fields, unpermuted, _claims, factors=True),
)
