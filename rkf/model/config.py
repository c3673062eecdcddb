"""A model's dimensions and token ids: what metadata holds, converters write and runtimes read (spec/metadata.md).

Architectures differ by numbers and by which tensors exist (biases, q/k norms): converters fold every other quirk away,
so no runtime branches on `architecture`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rkf.errors import UnsupportedError
from rkf.format.fields import Fields, integer, refuse, shown

_I32_MAX = (1 << 31) - 1
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

    @classmethod
    def from_metadata(cls, metadata: Any) -> ModelConfig:
        """The inverse of `to_metadata`, with every key checked.

        Raises StructureError naming the key, UnsupportedError for an architecture or rope scaling that is not known.
        """
        fields = Fields(metadata, "metadata.model", _REQUIRED, _OPTIONAL)
        config = cls(
            architecture=_known(fields, "architecture", ARCHITECTURES),
            **{key: fields.integer(key, 1, _I32_MAX) for key in _SIZES},
            norm_epsilon=fields.number("norm_epsilon"),
            rope_theta=fields.number("rope_theta"),
            rope_scaling=_rope_scaling(fields.raw("rope_scaling")) if "rope_scaling" in fields else None,
            sliding_window=fields.integer("sliding_window", 1, _I32_MAX) if "sliding_window" in fields else None,
            bos_id=fields.integer("bos_id") if "bos_id" in fields else None,
            eos_ids=tuple(integer(i, "metadata.model, eos_ids") for i in fields.list("eos_ids", 256)),
            add_bos=fields.flag("add_bos"),
            generation=fields.numbers("generation"),
        )
        config._check()
        return config

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Every tensor that the model may have, lazily: name, shape, and whether it must be there."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        linear = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        yield "model.embed_tokens.weight", (self.vocab_size, hidden), True
        yield "lm_head.weight", (self.vocab_size, hidden), True
        yield "model.norm.weight", (hidden,), True
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for name, (rows, columns) in linear.items():
                yield f"{prefix}{name}.weight", (rows, columns), True
                yield f"{prefix}{name}.bias", (rows,), False
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{prefix}{name}.weight", (hidden,), True
            for name in ("self_attn.q_norm", "self_attn.k_norm"):
                yield f"{prefix}{name}.weight", (self.head_dim,), False

    def _check(self) -> None:
        """What must hold between the keys."""
        if self.heads % self.kv_heads:
            refuse("metadata.model, heads", f"a multiple of kv_heads ({self.kv_heads})", self.heads)
        if self.head_dim % 2:
            refuse("metadata.model, head_dim", "an even number (rope turns pairs)", self.head_dim)
        for key in ("norm_epsilon", "rope_theta"):
            if getattr(self, key) <= 0:
                refuse(f"metadata.model, {key}", "a number above 0", getattr(self, key))
        for key, ids in (("bos_id", () if self.bos_id is None else (self.bos_id,)), ("eos_ids", self.eos_ids)):
            for token in ids:
                if token >= self.vocab_size:
                    refuse(f"metadata.model, {key}", f"token ids below vocab_size ({self.vocab_size})", token)
        if self.add_bos and self.bos_id is None:
            refuse("metadata.model, bos_id", "a token id, as add_bos is true", "none")


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "context_length",
)
_REQUIRED = (*_SIZES, "architecture", "norm_epsilon", "rope_theta", "eos_ids", "add_bos", "generation")
_OPTIONAL = ("rope_scaling", "sliding_window", "bos_id")
# rope scaling type -> the keys it must have
_ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "high_freq_factor", "low_freq_factor", "original_context"),
}


def _known(fields: Fields, key: str, choices: tuple[str, ...]) -> str:
    value = fields.raw(key)
    if isinstance(value, str) and value not in choices:
        expected = f"one of {', '.join(choices)}"
        raise UnsupportedError(f"{fields.at(key)}: expected {expected}, got {shown(value)}; update rkf")
    return fields.choice(key, choices)


def _rope_scaling(value: Any) -> RopeScaling:
    where = "metadata.model, rope_scaling"
    kind = _known(Fields(value, where, ("type",), None), "type", tuple(_ROPE_SCALINGS))
    fields = Fields(value, where, ("type", *_ROPE_SCALINGS[kind]))
    numbers = {key: fields.number(key) for key in _ROPE_SCALINGS[kind] if key != "original_context"}
    for key, number in numbers.items():
        if number <= 0:
            refuse(fields.at(key), "a number above 0", number)
    if kind == "linear":
        return RopeScaling(kind, numbers["factor"])
    if numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        refuse(fields.at("low_freq_factor"), f"less than {numbers['high_freq_factor']}", numbers["low_freq_factor"])
    return RopeScaling(
        type=kind,
        factor=numbers["factor"],
        low_freq_factor=numbers["low_freq_factor"],
        high_freq_factor=numbers["high_freq_factor"],
        original_context=fields.integer("original_context", 1, _I32_MAX),
    )


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, tuple):
        return list(value)
    return value
