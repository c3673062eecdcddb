"""ernie4_5: ERNIE 4.5, dense. A llama with rope of neighbours, and biases everywhere or nowhere."""

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
from rkf.converters.families.keys import flag, number, optional_size, size, token, tokens
from rkf.converters.families.layout import Layout, Origin, as_named, fused_rows
from rkf.model.program import MAX_LAYERS, Program


@dataclass(frozen=True, kw_only=True)
class Ernie45Keys(DecoderKeys):
    vocab_size: int = size(103424)
    hidden_size: int = size(1024)
    intermediate_size: int = size(3072)
    num_hidden_layers: int = size(18, most=MAX_LAYERS)
    num_attention_heads: int = size(16)
    num_key_value_heads: int | None = optional_size(2)
    head_dim: int | None = optional_size(128)
    max_position_embeddings: int = size(131072)
    rms_norm_eps: float = number(1e-5)
    tie_word_embeddings: bool = flag(True)
    rope_theta: float = number(500000.0)
    use_bias: bool = flag(False, or_null=True)
    bos_token_id: int | None = token(1)
    eos_token_id: tuple[int, ...] = tokens(2)


def _program(config: Ernie45Keys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    attends = attention(config, biases="qkvo" if config.use_bias else "", pairs="neighbours")
    layer = pre_norm_layer(config, attends, gated(config, bias=config.use_bias))
    return assemble(config, [layer] * config.num_hidden_layers, (turns,))


def originals(config: DecoderKeys, widths: Mapping[str, int], rest: Layout = as_named) -> Layout:
    """Tensors as in `rest`, or as in Baidu's own checkpoints: q, k and v in one matrix, gate and up in one, gate first.

    widths: the inner width of each gated module. Source: Ernie4_5Model in llama.cpp's conversion/ernie.py.
    """
    size = config.head_size
    rows = {"q": config.num_attention_heads * size, "k": config.kv_heads * size, "v": config.kv_heads * size}
    qkv = {"self_attn.qkv_proj": {f"self_attn.{part}_proj": count for part, count in rows.items()}}
    both = {
        f"{name}.up_gate_proj": {f"{name}.gate_proj": inner, f"{name}.up_proj": inner} for name, inner in widths.items()
    }
    fused = fused_rows(qkv | both)

    def layout(name: str) -> tuple[Origin, ...]:
        usual, other = rest(name), fused(name)
        return usual if other == as_named(name) else (*usual, *other)

    return layout


def _layout(config: Ernie45Keys) -> Layout:
    return originals(config, {"mlp": config.intermediate_size})


def _to_config(model: GgufModel) -> dict[str, Any]:
    return {
        "use_bias": "blk.0.attn_q.bias" in model.tensors,
        **whole_rope(model),
    }


def _to_fields(config: Ernie45Keys) -> GgufFields:
    config.refuse(config.use_bias, "use_bias", "false: llama.cpp has no biases here")
    return rope_fields(rope_scaling.whole(config), config.head_size)


FAMILY = Family(
    name="ernie4_5",
    class_name="Ernie4_5ForCausalLM",
    keys=Ernie45Keys,
    program=_program,
    layout=_layout,
    others=("ernie.",),
    gguf=GgufForm("ernie4_5", _to_config, _to_fields),
)
