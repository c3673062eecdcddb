"""arcee: Arcee's AFM. A llama whose feed-forward part is squared relu without a gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import assemble, attention, pre_norm_layer, ungated
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import activation, flag, number, size, token, tokens
from rkf.converters.families.llama import unpermuted
from rkf.model.program import Program


@dataclass(frozen=True, kw_only=True)
class ArceeKeys(DecoderKeys):
    hidden_size: int = size(2560)
    intermediate_size: int = size(18432)
    hidden_act: str = activation("relu2")
    max_position_embeddings: int = size(4096)
    rms_norm_eps: float = number(1e-5)
    attention_bias: bool = flag(False)
    mlp_bias: bool = flag(False)
    bos_token_id: int | None = token(128000)
    eos_token_id: tuple[int, ...] = tokens(128001)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heads_divide()


def _program(config: ArceeKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    attends = attention(config, biases="qkvo" if config.attention_bias else "")
    layer = pre_norm_layer(config, attends, ungated(config, bias=config.mlp_bias))
    return assemble(config, [layer] * config.num_hidden_layers, (turns,))


def _to_config(model: GgufModel) -> dict[str, Any]:
    return {
        "hidden_act": "relu2",
        "attention_bias": "blk.0.attn_q.bias" in model.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in model.tensors,
        **whole_rope(model),
    }


def _to_fields(config: ArceeKeys) -> GgufFields:
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    config.refuse(config.mlp_bias, "mlp_bias", "false: llama.cpp has no biases here")
    return rope_fields(rope_scaling.whole(config), config.head_size)


FAMILY = Family(
    name="arcee",
    class_name="ArceeForCausalLM",
    keys=ArceeKeys,
    program=_program,
    gguf=GgufForm("arcee", _to_config, _to_fields, unpermuted, activation="relu2", factors=True),
)
