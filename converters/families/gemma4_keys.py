"""The keys of gemma4_text's config.json, and the numbers of a layer that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.keys import (
    FULL,
    SLIDING,
    activation,
    count,
    flag,
    optional_number,
    optional_size,
    size,
    table,
    token,
    tokens,
    word,
)
from rkf.converters.families.windows import Windowed
from rkf.errors import SourceError, UnsupportedError
from rkf.model.frequencies import Frequencies
from rkf.model.program import MAX_LAYERS

_PERIOD = 6
# What the reference takes without rope_parameters.
_ROPES: Mapping[str, Any] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}


@dataclass(frozen=True, kw_only=True)
class Gemma4Keys(Windowed):
    vocab_size: int = size(262144)
    hidden_size: int = size(2304)
    intermediate_size: int = size(9216)
    num_hidden_layers: int = size(30, most=MAX_LAYERS)
    num_attention_heads: int = size(8)
    num_key_value_heads: int = size(4)
    head_dim: int = size(256)
    hidden_act: str = activation("gelu_pytorch_tanh", name="hidden_activation")
    max_position_embeddings: int = size(131072)
    tie_word_embeddings: bool = flag(True)
    attention_bias: bool = flag(False)
    sliding_window: int = size(512)
    final_logit_softcapping: float | None = optional_number()
    use_bidirectional_attention: str | None = word()
    vocab_size_per_layer_input: int = size(262144)
    hidden_size_per_layer_input: int = count(256)
    attention_k_eq_v: bool = flag(False)
    num_kv_shared_layers: int = count(0)
    use_double_wide_mlp: bool = flag(False)
    global_head_dim: int = size(512)
    num_global_key_value_heads: int | None = optional_size()
    per_layer_config: Mapping[str, Any] | None = table()
    enable_moe_block: bool = flag(False)
    num_experts: int | None = optional_size()
    top_k_experts: int | None = optional_size()
    moe_intermediate_size: int | None = optional_size()
    bos_token_id: int | None = token(2)
    eos_token_id: tuple[int, ...] = tokens(1)

    def __post_init__(self) -> None:
        super().__post_init__()
        causal = self.use_bidirectional_attention in (None, "vision")
        self.refuse(not causal, "use_bidirectional_attention", "null or 'vision': attention is causal")
        for layer in self.per_layer_config or ():
            if not layer.isdecimal() or int(layer) >= self.num_hidden_layers:
                raise SourceError(f"per_layer_config: expected numbers of layers, got {layer!r}")
        if set(self.kinds[: self.first_shared]) != set(self.kinds):
            raise SourceError("num_kv_shared_layers: expected a layer of each kind before those that share")
        if self.enable_moe_block and not (self.num_experts and self.top_k_experts and self.moe_intermediate_size):
            raise SourceError("enable_moe_block: expected num_experts, top_k_experts and moe_intermediate_size with it")

    @property
    def period(self) -> int:
        return _PERIOD

    @property
    def kinds(self) -> tuple[str, ...]:
        """The last layer always attends to everything."""
        return (*super().kinds[:-1], FULL)

    @property
    def first_shared(self) -> int:
        """The first layer that reads keys and values of another."""
        return max(self.num_hidden_layers - self.num_kv_shared_layers, 0)

    def heads(self, layer: int) -> tuple[int, int]:
        """The width of a layer's heads, and the number of its key heads."""
        if self.per_layer_config is None:
            if self.kinds[layer] == SLIDING:
                return self.head_dim, self.num_key_value_heads
            own = self.num_global_key_value_heads if self.attention_k_eq_v else None
            return self.global_head_dim, own or self.num_key_value_heads
        given = self.per_layer_config.get(str(layer), {})
        known = ("head_dim", "num_key_value_heads")
        if not isinstance(given, dict) or any(
            key not in known or type(value) is not int or value < 1 for key, value in given.items()
        ):
            raise UnsupportedError(f"per_layer_config: {layer}: expected {' and '.join(known)}, got {given!r}")
        return given.get(known[0], self.head_dim), given.get(known[1], self.num_key_value_heads)

    def rope(self, kind: str) -> dict[str, Any]:
        """The rope parameters of the layers of a kind."""
        given = (self.rope_parameters or _ROPES).get(kind)
        if not isinstance(given, dict):
            raise SourceError(f"rope_parameters, {kind}: expected an object, got {given!r}")
        kept = given.get("rope_type") == "proportional"
        rope = {"partial_rotary_factor": 1.0, "original_max_position_embeddings": self.max_position_embeddings} | given
        return rope if kept else rope_scaling.whole_heads({"rope_type": "default"} | rope)

    def frequencies(self, kind: str) -> Frequencies:
        """The rope of the layers of a kind."""
        widths = {self.heads(layer)[0] for layer, each in enumerate(self.kinds) if each == kind}
        if len(widths) > 1:
            raise UnsupportedError(f"per_layer_config: expected one head_dim for all layers of {kind}")
        return rope_scaling.frequencies(self.rope(kind), widths.pop(), self.max_position_embeddings)
