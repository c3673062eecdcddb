"""Keys of families some of whose layers have no rope. Knows no family.

A GGUF does not say which layers these are: llama.cpp assumes every fourth one.
"""

from __future__ import annotations

from dataclasses import dataclass

from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.keys import layer_numbers, size
from rkf.errors import SourceError, UnsupportedError

INTERVAL = 4  # of layers without rope, as llama.cpp assumes


@dataclass(frozen=True, kw_only=True)
class RopedLayers(DecoderKeys):
    no_rope_layers: tuple[int, ...] = layer_numbers()
    no_rope_layer_interval: int = size(INTERVAL)

    def __post_init__(self) -> None:
        if self.no_rope_layers and len(self.no_rope_layers) < self.num_hidden_layers:
            expected = f"at least {self.num_hidden_layers} numbers"
            raise SourceError(f"no_rope_layers: expected {expected}, got {len(self.no_rope_layers)}")
        super().__post_init__()

    @property
    def ropes(self) -> tuple[bool, ...]:
        """Whether each layer has rope. The key no_rope_layers holds 1 for those that have it."""
        given = self.no_rope_layers or [(n + 1) % self.no_rope_layer_interval for n in range(self.num_hidden_layers)]
        return tuple(bool(each) for each in given[: self.num_hidden_layers])

    def refuse_other_ropes(self) -> None:
        """Raise UnsupportedError unless the layers without rope are those that llama.cpp assumes."""
        if self.ropes != tuple((number + 1) % INTERVAL != 0 for number in range(self.num_hidden_layers)):
            raise UnsupportedError(f"no_rope_layers: llama.cpp assumes that every layer but each {INTERVAL}th has rope")
