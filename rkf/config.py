"""A model's dimensions and token ids: what metadata holds, converters write and runtimes read (spec/metadata.md).

Architectures differ by numbers and by which tensors exist (biases, q/k norms): converters fold every other quirk away,
so no runtime branches on `architecture`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rope frequencies are stretched. type: "linear" (factor) or "llama3" (all four)."""

    type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_context: int | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers that fix a decoder: RMSNorm, rope (half-split pairs), grouped-query attention, SwiGLU."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    generation: Mapping[str, float] = field(default_factory=dict)  # temperature, top_k, top_p, … the model recommends

    def to_metadata(self) -> dict[str, Any]:
        """A map for the directory: no None, tuples as lists."""
        return _without_none(asdict(self))

    # from_metadata(cls, metadata) -> ModelConfig: validates every key; raises StructureError. (room: container)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, tuple):
        return list(value)
    return value
