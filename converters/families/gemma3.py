"""gemma3: Gemma 3, text only. Norms with (1 + w) on both sides of a branch; windows and ropes differ by layer.

From a checkpoint with vision, only the decoder is converted; the vision tower and its projector are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import (
    HeadNorm,
    Layer,
    NormStyle,
    assemble,
    attention,
    double_norm_layer,
    gated,
)
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel, Wrapper
from rkf.converters.families.gguf_config import head_size, only_whole_heads
from rkf.converters.families.gguf_rope import rope_config, rope_fields, shortest
from rkf.converters.families.keys import (
    FULL,
    SLIDING,
    activation,
    flag,
    number,
    optional_number,
    optional_size,
    size,
    token,
    tokens,
)
from rkf.converters.families.layout import Added, Layout, Origin, as_named
from rkf.converters.families.windows import Windowed, window_config, window_fields
from rkf.errors import UnsupportedError
from rkf.model.program import MAX_LAYERS, Program

_GLOBAL_THETA, _LOCAL_THETA = 1000000.0, 10000.0
# The norms of a layer, in order of use; 1 is added to the weights of every norm.
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
ONE_ADDED = NormStyle(offset=1.0)
_LAYERS_27B = 62  # llama.cpp recognises by this the one model whose scores are not scaled by its head size


@dataclass(frozen=True, kw_only=True)
class Gemma3Keys(Windowed):
    vocab_size: int = size(262208)
    hidden_size: int = size(2304)
    intermediate_size: int = size(9216)
    num_hidden_layers: int = size(26, most=MAX_LAYERS)
    num_attention_heads: int = size(8)
    num_key_value_heads: int | None = optional_size(4)
    head_dim: int = size(256)
    hidden_act: str = activation("gelu_pytorch_tanh", name="hidden_activation")
    max_position_embeddings: int = size(131072)
    tie_word_embeddings: bool = flag(True)
    rope_theta: float = number(_GLOBAL_THETA)
    rope_local_base_freq: float = number(_LOCAL_THETA)
    attention_bias: bool = flag(False)
    query_pre_attn_scalar: int = size(256)
    sliding_window_pattern: int = size(6)
    final_logit_softcapping: float | None = optional_number()
    use_bidirectional_attention: bool = flag(False, or_null=True)
    bos_token_id: int | None = token(2)
    eos_token_id: tuple[int, ...] = tokens(1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(self.use_bidirectional_attention, "use_bidirectional_attention", "false: attention is causal")

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
    return assemble(
        config,
        (_layer(config, kind, numbers[kind]) for kind in config.kinds),
        tuple(ropes.values()),
        embedding_scale=config.hidden_size**0.5,
        final_norm=ONE_ADDED,
        softcap=config.final_logit_softcapping,
    )


def _layer(config: Gemma3Keys, kind: str, rope_number: int) -> Layer:
    attends = attention(
        config,
        biases="qkvo" if config.attention_bias else "",
        head_norm=HeadNorm(config.rms_norm_eps, offset=1.0),
        rope=rope_number,
        scale=config.query_pre_attn_scalar**-0.5,
        window=config.window(kind),
    )
    return double_norm_layer(config, attends, gated(config), NORMS, ONE_ADDED)


def _to_config(model: GgufModel) -> dict[str, Any]:
    own, width = model.own, head_size(model)
    only_whole_heads(own, width)
    layers = own["block_count"]
    wide = own["embedding_length"] // own["attention.head_count"]
    full = rope_config(model, width)
    local = {"rope_type": "default", "rope_theta": shortest(own.get("rope.freq_base_swa", _LOCAL_THETA))}
    return {
        **window_config(own, period=6),
        "query_pre_attn_scalar": wide if layers == _LAYERS_27B else width,
        "final_logit_softcapping": shortest(own.get("final_logit_softcapping")) or None,
        **rope_scaling.spelt(full),  # as read by transformers 4
        "rope_local_base_freq": local["rope_theta"],
        "rope_parameters": {FULL: full, SLIDING: local},
    }


def _to_fields(config: Gemma3Keys) -> GgufFields:
    wide = config.hidden_size // config.num_attention_heads
    scaled_by = wide if config.num_hidden_layers == _LAYERS_27B else config.head_size
    expected = f"{scaled_by}, which llama.cpp assumes"
    config.refuse(config.query_pre_attn_scalar != scaled_by, "query_pre_attn_scalar", expected)
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    full, sliding = config.ropes[FULL], config.ropes[SLIDING]
    if sliding["rope_type"] != "default":
        raise UnsupportedError(f"rope scaling {sliding['rope_type']!r} of layers with a window has no field in a GGUF")
    own = {
        "rope.freq_base_swa": float(sliding["rope_theta"]),
        "final_logit_softcapping": config.final_logit_softcapping,
        **window_fields(config),
    }
    return rope_fields(full, config.head_size).plus(own)


def one_added(config: DecoderKeys) -> Layout:
    """llama.cpp's converter adds 1 to the weights of norms (Gemma3Model.norm_shift in conversion/gemma.py)."""

    def layout(name: str) -> tuple[Origin, ...]:
        return (Origin((name,), steps=(Added(-1.0),)),) if name.endswith("norm.weight") else as_named(name)

    return layout


FAMILY = Family(
    name="gemma3_text",
    class_name="Gemma3ForCausalLM",
    keys=Gemma3Keys,
    program=_program,
    gguf=GgufForm("gemma3", _to_config, _to_fields, one_added, activation="gelu_tanh"),
    wrapper=Wrapper(
        model_type="gemma3",
        prefixes=("language_model.model.", "model.language_model."),
        dropped=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
        tied=True,
    ),
)
