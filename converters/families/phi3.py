"""phi3: Phi 3, 3.5 and 4 (mini too). Fused q/k/v and gate/up; rope may rotate part of a head; longrope."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import assemble, attention, gated, pre_norm_layer
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import only_usual_heads, partial_rope
from rkf.converters.families.gguf_rope import LONG, SHORT, rope_fields
from rkf.converters.families.gguf_yarn import LENGTH, MAGNITUDE
from rkf.converters.families.keys import number, optional_size, size, token, tokens
from rkf.converters.families.layout import Layout, fused_rows
from rkf.converters.families.windows import WINDOW
from rkf.errors import UnsupportedError
from rkf.model.program import Program


@dataclass(frozen=True, kw_only=True)
class Phi3Keys(DecoderKeys):
    vocab_size: int = size(32064)
    hidden_size: int = size(3072)
    intermediate_size: int = size(8192)
    max_position_embeddings: int = size(4096)
    original_max_position_embeddings: int | None = size(4096)
    rms_norm_eps: float = number(1e-5)
    sliding_window: int | None = optional_size()
    bos_token_id: int | None = token(1)
    eos_token_id: tuple[int, ...] = tokens(32000)


def _program(config: Phi3Keys) -> Program:
    turns = rope_scaling.table(_rope(config), config)
    layer = pre_norm_layer(config, attention(config, window=config.sliding_window), gated(config))
    return assemble(config, [layer] * config.num_hidden_layers, (turns,))


def _rope(config: Phi3Keys) -> dict[str, Any]:
    """Here "su" and "yarn" are old names of longrope, which uses the top-level original length."""
    found = rope_scaling.parameters(config)
    if found["rope_type"] in ("su", "yarn"):
        found["rope_type"] = "longrope"
    if found["rope_type"] not in ("default", "longrope"):
        raise UnsupportedError(f"rope scaling {found['rope_type']!r} is not supported; known: default, longrope")
    return found | {"original_max_position_embeddings": config.original_max_position_embeddings}


def _layout(config: Phi3Keys) -> Layout:
    queries, keys = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    return fused_rows(
        {
            "self_attn.qkv_proj": {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys},
            "mlp.gate_up_proj": {"mlp.gate_proj": config.intermediate_size, "mlp.up_proj": config.intermediate_size},
        }
    )


def _to_config(model: GgufModel) -> dict[str, Any]:
    own = model.own
    return {
        "sliding_window": own.get(WINDOW) or None,  # 0 means none
        "original_max_position_embeddings": own.get(LENGTH) or own["context_length"],
        **partial_rope(model),
    }


def _to_fields(config: Phi3Keys) -> GgufFields:
    only_usual_heads(config)
    found = _rope(config)
    fields = rope_fields(found | {"rope_type": "default"}, config.head_size)
    own = {
        **fields.own,
        WINDOW: config.sliding_window or 0,
        LENGTH: config.original_max_position_embeddings,
    }
    if found["rope_type"] == "default":
        return GgufFields(own)
    turns = rope_scaling.table(found, config)
    divisors = {LONG: found["long_factor"], SHORT: found["short_factor"]}
    return GgufFields(
        own | {"rope.scaling.type": "longrope", MAGNITUDE: turns.factor},
        {name: np.array(values, np.float32) for name, values in divisors.items()},
    )


FAMILY = Family(
    name="phi3",
    class_name="Phi3ForCausalLM",
    keys=Phi3Keys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("phi3", _to_config, _to_fields, _layout, ignored=(WINDOW,)),
)
