"""ministral3: Ministral 3. A mistral with yarn whose queries grow with the position.

From a checkpoint with vision, only the decoder is converted; the vision tower and its projector are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import Temperature, assemble, attention, gated, pre_norm_layer
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import head_size, only_whole_heads
from rkf.converters.families.gguf_rope import rope_config, rope_fields, shortest
from rkf.converters.families.keys import number, optional_size, size, token, tokens
from rkf.converters.families.llama import unpermuted
from rkf.converters.families.mistral import WRAPPER
from rkf.errors import SourceError
from rkf.model.program import MAX_LAYERS, Program

_BETA, _LENGTH = "llama_4_scaling_beta", "original_max_position_embeddings"
_TEMPERATURE = "attention.temperature_scale"
# What the reference takes without rope_parameters.
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    _LENGTH: 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    _BETA: 0.1,
}


@dataclass(frozen=True, kw_only=True)
class Ministral3Keys(DecoderKeys):
    vocab_size: int = size(131072)
    intermediate_size: int = size(14336)
    num_hidden_layers: int = size(34, most=MAX_LAYERS)
    num_key_value_heads: int | None = optional_size(8)
    head_dim: int = size(128)
    max_position_embeddings: int = size(262144)
    rms_norm_eps: float = number(1e-5)
    sliding_window: int | None = optional_size()
    bos_token_id: int | None = token(1)
    eos_token_id: tuple[int, ...] = tokens(2)


def _program(config: Ministral3Keys) -> Program:
    parameters = _rope(config)
    turns = rope_scaling.table(parameters, config)
    beta = float(parameters[_BETA])
    temperature = Temperature(beta, int(parameters[_LENGTH])) if beta else None
    attends = attention(config, window=config.sliding_window, temperature=temperature)
    return assemble(config, [pre_norm_layer(config, attends, gated(config))] * config.num_hidden_layers, (turns,))


def _rope(config: Ministral3Keys) -> dict[str, Any]:
    given = config.rope_scaling or (_ROPE if config.rope_parameters is None else config.rope_parameters)
    found = rope_scaling.whole_heads(rope_scaling.standard(dict(given), config))
    for key, kinds in ((_BETA, (int, float)), (_LENGTH, (int,))):
        if type(found.get(key)) not in kinds or found[key] < 0:
            raise SourceError(f"rope_parameters: {key}: expected a number, got {found.get(key)!r}")
    return found


def _to_config(model: GgufModel) -> dict[str, Any]:
    """Mistral Small 3 has this architecture too, without a temperature."""
    only_whole_heads(model.own, head_size(model))
    found = {_LENGTH: model.own["context_length"]} | rope_config(model, head_size(model), tuned_yarn=True)
    return rope_scaling.spelt(found | {_BETA: shortest(model.own.get(_TEMPERATURE, 0.0))})


def _to_fields(config: Ministral3Keys) -> GgufFields:
    config.refuse(config.sliding_window is not None, "sliding_window", "null: llama.cpp has no window here")
    parameters = _rope(config)
    return rope_fields(parameters, config.head_size, tuned_yarn=True).plus({_TEMPERATURE: float(parameters[_BETA])})


def _claims(own: Mapping[str, Any]) -> bool:
    return not own.get("expert_count")


FAMILY = Family(
    name="ministral3",
    class_name="Ministral3ForCausalLM",
    keys=Ministral3Keys,
    program=_program,
    gguf=GgufForm("mistral3", _to_config, _to_fields, unpermuted, _claims, factors=True),
    wrapper=WRAPPER,
)
