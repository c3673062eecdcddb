"""qwen3: Qwen 3, dense. A norm of each head of q and k before rope; windows as in Qwen 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import HeadNorm, assemble, attention, gated, pre_norm_layer
from rkf.converters.families.family import Family, GgufForm, GgufModel
from rkf.converters.families.keys import flag, size
from rkf.converters.families.qwen2 import QwenKeys, to_config, to_fields
from rkf.converters.families.windows import WINDOW
from rkf.model.program import Program


@dataclass(frozen=True, kw_only=True)
class Qwen3Keys(QwenKeys):
    head_dim: int = size(128)
    attention_bias: bool = flag(False)


def _program(config: Qwen3Keys) -> Program:
    turns = rope_scaling.table(config.rope, config)
    biases, norm = "qkvo" if config.attention_bias else "", HeadNorm(config.rms_norm_eps)
    layers = (
        pre_norm_layer(config, attention(config, biases=biases, head_norm=norm, window=window), gated(config))
        for window in config.windows
    )
    return assemble(config, layers, (turns,))


def _to_config(model: GgufModel) -> dict[str, Any]:
    return {**to_config(model), "attention_bias": "blk.0.attn_q.bias" in model.tensors}


# Annotated and not subscripted: the call of a subscripted frozen class with slots fails in Python 3.11.
_GGUF: GgufForm[Qwen3Keys] = GgufForm("qwen3", _to_config, to_fields, ignored=(WINDOW,))

FAMILY = Family(
    name="qwen3",
    class_name="Qwen3ForCausalLM",
    keys=Qwen3Keys,
    program=_program,
    gguf=_GGUF,
)
