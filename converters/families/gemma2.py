"""gemma2: Gemma 2. Norms with (1 + w) around branches, softcaps on scores and logits; windows in half of the layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import Layer, NormStyle, assemble, attention, double_norm_layer, gated
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import head_size, whole_rope
from rkf.converters.families.gguf_rope import rope_fields, shortest
from rkf.converters.families.keys import activation, flag, optional_number, optional_size, size, token, tokens
from rkf.converters.families.layout import one_added
from rkf.converters.families.windows import WINDOW, Windowed, always_windowed, one_rope, periodic, window_config
from rkf.errors import UnsupportedError
from rkf.model.frequencies import Frequencies
from rkf.model.program import MAX_LAYERS, Program

_PERIOD = 2
_LAYERS_27B = 46
# What llama.cpp also assumes where a GGUF has none: softcaps, and the window.
_SCORES, _LOGITS = 50.0, 30.0
_WINDOW = 4096

# The norms of a layer, in order of use; 1 is added to the weights of every norm.
_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_ONE_ADDED = NormStyle(offset=1.0)


@dataclass(frozen=True, kw_only=True)
class GemmaKeys(Windowed):
    """Keys of Gemma 2 and 3."""

    hidden_size: int = size(2304)
    intermediate_size: int = size(9216)
    num_hidden_layers: int = size(26, most=MAX_LAYERS)
    num_attention_heads: int = size(8)
    num_key_value_heads: int | None = optional_size(4)
    head_dim: int = size(256)
    hidden_act: str = activation("gelu_pytorch_tanh", name="hidden_activation")
    tie_word_embeddings: bool = flag(True)
    attention_bias: bool = flag(False)
    query_pre_attn_scalar: int = size(256)
    final_logit_softcapping: float | None = optional_number()
    use_bidirectional_attention: bool = flag(False, or_null=True)
    bos_token_id: int | None = token(2)
    eos_token_id: tuple[int, ...] = tokens(1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(self.use_bidirectional_attention, "use_bidirectional_attention", "false: attention is causal")


@dataclass(frozen=True, kw_only=True)
class Gemma2Keys(GemmaKeys):
    vocab_size: int = size(256000)
    max_position_embeddings: int = size(8192)
    final_logit_softcapping: float | None = optional_number(_LOGITS)
    attn_logit_softcapping: float | None = optional_number(_SCORES)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heads_divide()

    @property
    def period(self) -> int:
        return _PERIOD


def _program(config: Gemma2Keys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    return program(config, (_attention(config, kind) for kind in config.kinds), (turns,))


def program(config: GemmaKeys, attentions: Iterable[Layer], ropes: tuple[Frequencies, ...]) -> Program:
    """A program with the given attention in each layer."""
    return assemble(
        config,
        (double_norm_layer(config, attends, gated(config), _NORMS, _ONE_ADDED) for attends in attentions),
        ropes,
        embedding_scale=config.hidden_size**0.5,
        final_norm=_ONE_ADDED,
        softcap=config.final_logit_softcapping,
    )


def _attention(config: Gemma2Keys, kind: str) -> Layer:
    return attention(
        config,
        biases="qkvo" if config.attention_bias else "",
        scale=config.query_pre_attn_scalar**-0.5,
        window=config.window(kind),
        softcap=config.attn_logit_softcapping,
    )


def _to_config(model: GgufModel) -> dict[str, Any]:
    own = {WINDOW: _WINDOW, **model.own}
    one_rope(own)
    always_windowed(own)
    return {
        **window_config(own, _PERIOD),
        "query_pre_attn_scalar": assumed_scalar(model, _LAYERS_27B),
        "attn_logit_softcapping": shortest(own.get("attn_logit_softcapping", _SCORES)),
        "final_logit_softcapping": shortest(own.get("final_logit_softcapping", _LOGITS)),
        **whole_rope(model),
    }


def _to_fields(config: Gemma2Keys) -> GgufFields:
    refuse_attention(config, _LAYERS_27B)
    config.refuse(not config.tie_word_embeddings, "tie_word_embeddings", "true: llama.cpp has no separate head here")
    config.refuse(config.attn_logit_softcapping is None, "attn_logit_softcapping", "a number: llama.cpp always has one")
    config.refuse(
        config.final_logit_softcapping is None, "final_logit_softcapping", "a number: llama.cpp always has one"
    )
    if config.kinds != periodic(config.num_hidden_layers, _PERIOD):
        raise UnsupportedError("layer_types: llama.cpp assumes a window in every second layer, the first one included")
    own = {
        WINDOW: config.sliding_window,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }
    return rope_fields(rope_scaling.whole(config), config.head_size).plus(own)


def assumed_scalar(model: GgufModel, layers_27b: int) -> int:
    """The query_pre_attn_scalar that llama.cpp assumes: the head size, but hidden_size / heads for the 27B model, which
    it recognises by its number of layers.
    """
    own = model.own
    if own["block_count"] != layers_27b:
        return head_size(model)
    return int(own["embedding_length"] // own["attention.head_count"])


def refuse_attention(config: GemmaKeys, layers_27b: int) -> None:
    """Refuse an attention that llama.cpp computes differently."""
    wide = config.hidden_size // config.num_attention_heads
    scaled_by = wide if config.num_hidden_layers == layers_27b else config.head_size
    expected = f"{scaled_by}, which llama.cpp assumes"
    config.refuse(config.query_pre_attn_scalar != scaled_by, "query_pre_attn_scalar", expected)
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")


FAMILY = Family(
    name="gemma2",
    class_name="Gemma2ForCausalLM",
    keys=Gemma2Keys,
    program=_program,
    gguf=GgufForm("gemma2", _to_config, _to_fields, lambda config: one_added, activation="gelu_tanh"),
)
