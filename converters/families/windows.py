"""Keys of families whose layers attend to everything or to a window, by layer_types. Knows no family.

A GGUF stores the window, and which layers have it as a period or as one flag per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.gguf_rope import stretch
from rkf.converters.families.keys import FULL, SLIDING, layer_types, optional_size
from rkf.errors import SourceError, UnsupportedError

WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"


def used_window(used: bool, window: int | None) -> int | None:
    """sliding_window if use_sliding_window says so. One of 0, which hides all tokens, may stand there unused."""
    if used and window == 0:
        raise SourceError("sliding_window: expected a number above 0 with use_sliding_window, got 0")
    return window if used else None


@dataclass(frozen=True, kw_only=True)
class Windowed(DecoderKeys):
    sliding_window: int | None = optional_size(4096)
    layer_types: tuple[str, ...] | None = layer_types()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.kinds) != self.num_hidden_layers:
            raise SourceError(f"layer_types: expected {self.num_hidden_layers} words, got {len(self.kinds)}")
        if self.sliding_window is None and SLIDING in self.kinds:
            raise SourceError(f"sliding_window: expected a number, as layer_types has {SLIDING}, got null")

    @property
    def period(self) -> int:
        """Without layer_types, the last one of so many layers attends to everything."""
        return 4

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of attention of each layer, as a word of layer_types."""
        return periodic(self.num_hidden_layers, self.period) if self.layer_types is None else self.layer_types

    def window(self, kind: str) -> int | None:
        """The window of a layer of this kind."""
        return self.sliding_window if kind == SLIDING else None


def periodic(layers: int, period: int) -> tuple[str, ...]:
    """Kinds of layers of which the last of each period attends to everything."""
    return tuple(SLIDING if period == 0 or (number + 1) % period else FULL for number in range(layers))


def window_config(own: Mapping[str, Any], period: int) -> dict[str, Any]:
    """The keys of a GGUF's fields, where heads are the same in all layers. period: what llama.cpp assumes for this
    architecture.
    """
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if own.get(f"{key}_swa", own.get(key)) != own.get(key):
            raise UnsupportedError(f"{key}_swa is {own[f'{key}_swa']}, expected {own.get(key)} as in {key}")
    return layer_windows(own, period)


def layer_windows(own: Mapping[str, Any], period: int) -> dict[str, Any]:
    """The window, and which layers have it. period: as above; 0 gives a window to all of them."""
    window, layers = own.get(WINDOW) or None, own["block_count"]
    pattern = own.get(_PATTERN, period)
    if window is None:
        kinds: list[str] = [FULL] * layers
    elif isinstance(pattern, np.ndarray):
        kinds = [SLIDING if flag else FULL for flag in pattern]
    else:
        kinds = list(periodic(layers, pattern))
    return {"sliding_window": window, "layer_types": kinds}


def always_windowed(own: Mapping[str, Any]) -> None:
    """Refuse a file without a window, for an architecture in which llama.cpp always has one."""
    if not own.get(WINDOW):
        raise SourceError(f"field {WINDOW}: expected an integer above 0 in this architecture, got {own.get(WINDOW)}")


def one_rope(own: Mapping[str, Any]) -> None:
    """Refuse a rope of its own in layers with a window. These are stretched in llama.cpp whatever the kind of scaling
    (`get_rope_freq_scale` in llama-model.cpp).
    """
    theta, (given, factor) = own.get("rope.freq_base", 10000.0), stretch(own)
    if own.get("rope.freq_base_swa", theta) != theta:
        raise UnsupportedError(f"rope.freq_base_swa is {own['rope.freq_base_swa']}, expected {theta} as rope.freq_base")
    if own.get("rope.scaling.type") == "none" and factor != 1:
        raise UnsupportedError(f"{given}: {factor} is not supported with rope scaling 'none' here; expected 1")


def window_fields(config: Windowed) -> dict[str, Any]:
    """The fields of a GGUF; none if no layer has a window."""
    if SLIDING not in config.kinds:
        return {}
    return {WINDOW: config.sliding_window, _PATTERN: [kind == SLIDING for kind in config.kinds]}
