"""The keys of config.json that every family has. Knows no family."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkf.converters.families.keys import (
    activation,
    flag,
    number,
    optional_number,
    optional_size,
    size,
    table,
    token,
    tokens,
)
from rkf.errors import SourceError, UnsupportedError
from rkf.model.program import MAX_LAYERS


@dataclass(frozen=True, kw_only=True)
class DecoderKeys:
    """The keys that every family has, with the most common defaults."""

    vocab_size: int = size(32000)
    hidden_size: int = size(4096)
    intermediate_size: int = size(11008)
    num_hidden_layers: int = size(32, most=MAX_LAYERS)
    num_attention_heads: int = size(32)
    num_key_value_heads: int | None = optional_size()
    head_dim: int | None = optional_size()
    hidden_act: str = activation("silu")
    max_position_embeddings: int = size(2048)
    original_max_position_embeddings: int | None = optional_size()
    rms_norm_eps: float = number(1e-6)
    tie_word_embeddings: bool = flag(False)
    is_causal: bool = flag(True)
    rope_theta: float = number(10000.0)
    rope_parameters: Mapping[str, Any] | None = table()
    rope_scaling: Mapping[str, Any] | None = table()
    partial_rotary_factor: float | None = optional_number()
    bos_token_id: int | None = token(None)
    eos_token_id: tuple[int, ...] = tokens()

    def __post_init__(self) -> None:
        self.refuse(not self.is_causal, "is_causal", "true: attention is causal")
        if self.num_attention_heads % self.kv_heads:
            expected = f"a divisor of num_attention_heads ({self.num_attention_heads})"
            raise SourceError(f"num_key_value_heads: expected {expected}, got {self.kv_heads}")
        if self.head_dim is None and self.num_attention_heads > self.hidden_size:
            raise SourceError(f"num_attention_heads: expected at most hidden_size ({self.hidden_size})")

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """The width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def heads_divide(self) -> None:
        """Raise SourceError unless the heads divide hidden_size, for a family whose reference needs that."""
        if self.hidden_size % self.num_attention_heads:
            raise SourceError(f"num_attention_heads: expected a divisor of hidden_size ({self.hidden_size})")

    def usual_heads(self) -> None:
        """`heads_divide`, and refuse another head_dim, for a family whose reference reads it in the rope alone."""
        self.heads_divide()
        size = self.hidden_size // self.num_attention_heads
        self.refuse(self.head_dim not in (None, size), "head_dim", f"{size}, hidden_size / num_attention_heads")

    def refuse(self, holds: bool, key: str, expected: str) -> None:
        """Raise UnsupportedError if `holds`: the key asks for something that rkf cannot express or read."""
        if holds:
            raise UnsupportedError(f"{key}: {reprlib.repr(getattr(self, key))} is not supported; expected {expected}")
