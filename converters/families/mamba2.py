"""mamba2: Mamba 2. Layers are a norm and a mixer alone; there is no attention and no feed-forward part."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from rkf.converters.families.blocks import EMBEDDING, FINAL_NORM, add, assemble, norm
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import RMS_EPSILON
from rkf.converters.families.gguf_rope import shortest
from rkf.converters.families.keys import flag, ignored, limits, number, size, token, tokens
from rkf.converters.families.layout import Origin, renamed
from rkf.converters.families.mamba_mixer import MambaMixer, mixer_sizes
from rkf.errors import SourceError
from rkf.model.program import MAX_LAYERS, Program

_NAMES = {"input_layernorm": "norm", FINAL_NORM: "backbone.norm_f"}
_CONTEXT = 1 << 20  # a model has no greatest length; this is the one that llama.cpp's converter writes


@dataclass(frozen=True, kw_only=True)
class Mamba2Keys(DecoderKeys):
    vocab_size: int = size(32768)
    num_hidden_layers: int = size(64, most=MAX_LAYERS)
    rms_norm_eps: float = number(1e-5, name="layer_norm_epsilon")
    expand: int = size(2)
    num_heads: int = size(128)
    head_dim: int = size(64)
    n_groups: int = size(8)
    state_size: int = size(128)
    conv_kernel: int = size(4)
    use_bias: bool = flag(False)
    use_conv_bias: bool = flag(True)
    time_step_limit: tuple[float, float] = limits(0.0, inf)
    bos_token_id: int | None = token(0)
    eos_token_id: tuple[int, ...] = tokens(2)
    max_position_embeddings: int = ignored(_CONTEXT)
    intermediate_size: int = ignored(0)
    num_attention_heads: int = ignored(0)
    num_key_value_heads: int | None = ignored(0)

    def __post_init__(self) -> None:
        expected = self.hidden_size * self.expand
        if self.num_heads * self.head_dim != expected:
            got = f"{self.num_heads} * {self.head_dim}"
            raise SourceError(
                f"num_heads: expected num_heads * head_dim = hidden_size * expand = {expected}, got {got}"
            )

    @property
    def mixer(self) -> MambaMixer:
        return MambaMixer(
            name="mixer",
            hidden=self.hidden_size,
            heads=self.num_heads,
            head_dim=self.head_dim,
            groups=self.n_groups,
            state_dim=self.state_size,
            taps=self.conv_kernel,
            limits=self.time_step_limit,
            bias=self.use_bias,
            conv_bias=self.use_conv_bias,
            act=self.hidden_act,
            epsilon=self.rms_norm_eps,
        )


def _program(config: Mamba2Keys) -> Program:
    layer = (norm(config, "input_layernorm"), *config.mixer.ops(), add("o"))
    return assemble(config, [layer] * config.num_hidden_layers, ())


def _rest(name: str) -> tuple[Origin, ...]:
    """Old checkpoints have another name for the embedding."""
    if name == EMBEDDING:
        return Origin(("backbone.embeddings.weight",)), Origin(("backbone.embedding.weight",))
    return renamed(_NAMES)(name)


def _to_config(model: GgufModel) -> dict[str, Any]:
    sizes = mixer_sizes(model.own)
    return {
        "layer_norm_epsilon": shortest(model.own.get(RMS_EPSILON)),
        "expand": sizes["expand"],
        "num_heads": sizes["heads"],
        "head_dim": sizes["head_dim"],
        "n_groups": sizes["groups"],
        "state_size": sizes["state_dim"],
        "conv_kernel": sizes["taps"],
    }


def _to_fields(config: Mamba2Keys) -> GgufFields:
    """A model without attention has 0 heads and none of the fields of heads."""
    heads = dict.fromkeys(("attention.head_count_kv", "attention.key_length", "attention.value_length"))
    return GgufFields({**heads, **config.mixer.to_fields()})


FAMILY = Family(
    name="mamba2",
    class_name="Mamba2ForCausalLM",
    keys=Mamba2Keys,
    program=_program,
    layout=lambda config: config.mixer.layout(_rest),
    gguf=GgufForm("mamba2", _to_config, _to_fields, lambda config: config.mixer.gguf_layout(_rest)),
    prefix="backbone.",
)
