"""gemma3: Gemma 3, text only. As Gemma 2 but norms of q and k, no softcap of scores, and ropes that differ by layer.

From a checkpoint with vision, only the decoder is converted; the vision tower and its projector are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import HeadNorm, Layer, attention
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel, Wrapper
from rkf.converters.families.gemma2 import GemmaKeys, assumed_scalar, program, refuse_attention
from rkf.converters.families.gguf_config import head_size, only_whole_heads
from rkf.converters.families.gguf_rope import rope_config, rope_fields, shortest
from rkf.converters.families.gguf_yarn import MAGNITUDE
from rkf.converters.families.keys import FULL, SLIDING, number, size
from rkf.converters.families.layout import one_added
from rkf.converters.families.windows import WINDOW, window_config, window_fields
from rkf.errors import UnsupportedError
from rkf.model.program import Program

_GLOBAL_THETA, _LOCAL_THETA = 1000000.0, 10000.0
_LAYERS_27B = 62


@dataclass(frozen=True, kw_only=True)
class Gemma3Keys(GemmaKeys):
    vocab_size: int = size(262208)
    max_position_embeddings: int = size(131072)
    rope_theta: float = number(_GLOBAL_THETA)
    rope_local_base_freq: float = number(_LOCAL_THETA)
    sliding_window_pattern: int = size(6)

    @property
    def period(self) -> int:
        return self.sliding_window_pattern

    @property
    def ropes(self) -> dict[str, dict[str, Any]]:
        """Rope parameters by kind of layer."""
        return rope_scaling.by_kind(self, {FULL: self.rope_theta, SLIDING: self.rope_local_base_freq})


def _program(config: Gemma3Keys) -> Program:
    ropes = rope_scaling.tables(config.ropes, config.kinds, config)
    numbers = {kind: number for number, kind in enumerate(ropes)}
    return program(config, (_attention(config, kind, numbers[kind]) for kind in config.kinds), tuple(ropes.values()))


def _attention(config: Gemma3Keys, kind: str, rope_number: int) -> Layer:
    return attention(
        config,
        biases="qkvo" if config.attention_bias else "",
        head_norm=HeadNorm(config.rms_norm_eps, offset=1.0),
        rope=rope_number,
        scale=config.query_pre_attn_scalar**-0.5,
        window=config.window(kind),
    )


def _to_config(model: GgufModel) -> dict[str, Any]:
    own, width = model.own, head_size(model)
    only_whole_heads(own, width)
    full = rope_config(model, width)
    if own.get(WINDOW) and own.get(MAGNITUDE, 1.0) != 1:
        raise UnsupportedError(f"{MAGNITUDE}: {own[MAGNITUDE]} is not supported: llama.cpp applies it to windows too")
    local = {"rope_type": "default", "rope_theta": shortest(own.get("rope.freq_base_swa", _LOCAL_THETA))}
    return {
        **window_config(own, period=6),
        "query_pre_attn_scalar": assumed_scalar(model, _LAYERS_27B),
        "final_logit_softcapping": shortest(own.get("final_logit_softcapping")) or None,
        **rope_scaling.spelt(full),  # as read by transformers 4
        "rope_local_base_freq": local["rope_theta"],
        "rope_parameters": {FULL: full, SLIDING: local},
    }


def _to_fields(config: Gemma3Keys) -> GgufFields:
    refuse_attention(config, _LAYERS_27B)
    full, sliding = config.ropes[FULL], config.ropes[SLIDING]
    if sliding["rope_type"] != "default":
        raise UnsupportedError(f"rope scaling {sliding['rope_type']!r} of layers with a window has no field in a GGUF")
    own = {
        "rope.freq_base_swa": float(sliding["rope_theta"]),
        "final_logit_softcapping": config.final_logit_softcapping,
        **window_fields(config),
    }
    found = rope_fields(full, config.head_size)
    if MAGNITUDE in found.own and SLIDING in config.kinds:
        raise UnsupportedError("attention_factor, mscale: llama.cpp applies them in layers with a window too")
    return found.plus(own)


FAMILY = Family(
    name="gemma3_text",
    class_name="Gemma3ForCausalLM",
    keys=Gemma3Keys,
    program=_program,
    gguf=GgufForm("gemma3", _to_config, _to_fields, lambda config: one_added, activation="gelu_tanh"),
    wrapper=Wrapper(
        model_type="gemma3",
        prefixes=("language_model.model.", "model.language_model."),
        dropped=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
        tied=True,
    ),
)
