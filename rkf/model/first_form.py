"""The metadata of a 1.0 file (spec/metadata.md), and its reading as a program.

Such a file has numbers and no program. Its architectures differ only in these numbers and in optional tensors: biases,
and norms of queries and keys.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rkf.errors import UnsupportedError
from rkf.format.fields import Fields, integer, refuse, shown
from rkf.model.frequencies import Frequencies
from rkf.model.op import Op
from rkf.model.op_maps import MAX_FREQUENCIES, MAX_LAYERS
from rkf.model.ops import Add, Attention, Embed, Gate, Linear, Logits, Norm, Rope
from rkf.model.program import Program, layer_prefix

_I32_MAX = (1 << 31) - 1
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FIRST = "input_layernorm.weight"  # a tensor that every layer has
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A scaling of rope frequencies. type: "linear" (factor) or "llama3" (all four)."""

    type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_context: int | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers that determine a decoder: RMSNorm, rope (half-split pairs), grouped-query attention, SwiGLU."""

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

    @classmethod
    def from_metadata(cls, metadata: Any) -> ModelConfig:
        """The numbers of a map, with every key checked.

        Raises StructureError that names the key, UnsupportedError for an unknown architecture or rope scaling.
        """
        _refuse_unknown_words(metadata)
        fields = Fields(metadata, "metadata.model", _REQUIRED, _OPTIONAL)
        config = cls(
            architecture=fields.choice("architecture", ARCHITECTURES),
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

    def program(self, tensors: Container[str]) -> Program:
        """The forward pass of spec/metadata.md, section 3. tensors: those of the file, to find its biases and norms."""
        kinds: dict[tuple[Op, ...], int] = {}
        order = tuple(kinds.setdefault(self._layer(n, tensors), len(kinds)) for n in range(self._counted(tensors)))
        return Program(
            stem=(Embed(dst="x", table=EMBEDDING, rows=self.vocab_size, cols=self.hidden_size),),
            kinds=tuple(kinds),
            order=order,
            top=(
                Norm(src="x", dst="h", weight="model.norm.weight", epsilon=self.norm_epsilon),
                Logits(src="h", dst="logits", weight=HEAD, rows=self.vocab_size),
            ),
            ropes=(self._rope(),),
        )

    def _counted(self, tensors: Container[str]) -> int:
        """The number of layers; a forged one is refused at the first layer without a tensor in the file."""
        for number in range(self.layers):
            name = layer_prefix(number) + _FIRST
            if name not in tensors:
                refuse(f"tensor {name!r}", f"one for each of {self.layers} layers", "no such tensor")
        if self.layers > MAX_LAYERS:
            raise UnsupportedError(f"metadata.model, layers: {self.layers} is more than {MAX_LAYERS}; update rkf")
        return self.layers

    def _rope(self) -> Frequencies:
        """The one rope of the model; a forged head_dim costs nothing."""
        most = 2 * MAX_FREQUENCIES
        if self.head_dim > most:
            raise UnsupportedError(f"metadata.model, head_dim: {self.head_dim} is more than {most}; update rkf")
        with np.errstate(all="ignore"):
            found = frequencies(self)
        if not np.isfinite(found).all():
            refuse("metadata.model, rope_theta and rope_scaling", "frequencies that are finite as f32", "others")
        return Frequencies(tuple(found.tolist()))

    def _layer(self, number: int, tensors: Container[str]) -> tuple[Op, ...]:
        prefix = layer_prefix(number)

        def linear(src: str, dst: str, name: str, rows: int) -> Linear:
            bias = f"{name}.bias"
            return Linear(
                src=src, dst=dst, weight=f"{name}.weight", rows=rows, bias=bias if prefix + bias in tensors else None
            )

        def norm(name: str) -> Norm:
            return Norm(src="x", dst="h", weight=f"{name}.weight", epsilon=self.norm_epsilon)

        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        ops: list[Op] = [norm("input_layernorm")]
        ops += [linear("h", part, f"self_attn.{part}_proj", queries if part == "q" else keys) for part in "qkv"]
        for part in "qk":
            weight = f"self_attn.{part}_norm.weight"
            if prefix + weight in tensors:
                ops.append(Norm(src=part, dst=part, weight=weight, epsilon=self.norm_epsilon, group=self.head_dim))
        ops += [Rope(src=part, dst=part, table=0, head_dim=self.head_dim) for part in "qk"]
        return (
            *ops,
            Attention(
                q="q",
                k="k",
                v="v",
                dst="a",
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                value_dim=self.head_dim,
                scale=self.head_dim**-0.5,
                window=self.sliding_window,
            ),
            linear("a", "o", "self_attn.o_proj", self.hidden_size),
            Add(a="x", b="o", dst="x"),
            norm("post_attention_layernorm"),
            linear("h", "gate", "mlp.gate_proj", self.intermediate_size),
            linear("h", "up", "mlp.up_proj", self.intermediate_size),
            Gate(a="gate", b="up", dst="m", act="silu"),
            linear("m", "d", "mlp.down_proj", self.hidden_size),
            Add(a="x", b="d", dst="x"),
        )

    def _check(self) -> None:
        """Check the relations between keys."""
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
# rope scaling type -> its required keys
_ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "high_freq_factor", "low_freq_factor", "original_context"),
}


def _refuse_unknown_words(metadata: Any) -> None:
    """Raise UnsupportedError for an architecture or a rope that this version does not know.

    This runs before any check for damage, because a newer writer's other keys are not damage either.
    """
    scaling = metadata.get("rope_scaling") if isinstance(metadata, dict) else None
    for where, holder, key, choices in (
        ("metadata.model, architecture", metadata, "architecture", ARCHITECTURES),
        ("metadata.model, rope_scaling, type", scaling, "type", tuple(_ROPE_SCALINGS)),
    ):
        word = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(word, str) and word not in choices:
            expected = f"one of {', '.join(choices)}"
            raise UnsupportedError(f"{where}: expected {expected}, got {shown(word)}; update rkf")


def _rope_scaling(value: Any) -> RopeScaling:
    where = "metadata.model, rope_scaling"
    kind = Fields(value, where, ("type",), None).choice("type", tuple(_ROPE_SCALINGS))
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


def frequencies(config: ModelConfig) -> NDArray[np.float32]:
    """Radians per position, `f32[head_dim / 2]`, as in transformers' modeling_rope_utils.py."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain = (1 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.type == "linear":
        return plain / np.float32(scaling.factor)
    # llama3: long waves are stretched, short ones kept, those between blended by their rotations in the old context.
    given = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context)
    low, high, old = cast(tuple[float, float, float], given)  # checked by ModelConfig.from_metadata
    wavelength = 2 * np.pi / plain
    blend = np.clip((old / wavelength - low) / (high - low), 0, 1)
    return ((1 - blend) * plain / scaling.factor + blend * plain).astype(np.float32)
