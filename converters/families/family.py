"""The interface of a family to the converters: its keys, its program, its names. Knows no family and no format."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.layout import Layout, as_named
from rkf.model.program import Program

C = TypeVar("C", bound=DecoderKeys)

# These are not weights: old checkpoints stored frequencies and causal masks, which the configuration determines.
_DERIVED = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    r"|\w+\.layers\.\d+\.attention\.(rotary_emb\.inv_freq|bias|masked_bias)"
)


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A multimodal model around a decoder; only the decoder is converted.

    prefixes: prefixes of the decoder's tensor names, in place of "model.". dropped: prefixes of the names that are left
    out. tied: what tie_word_embeddings is unless the outer configuration has it; None if the decoder's own counts,
    because the reference has the head inside the decoder.
    """

    model_type: str
    prefixes: tuple[str, ...]
    dropped: tuple[str, ...]
    tied: bool | None

    def text(self, config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
        """The decoder's own configuration, and keys of the outer model that count for its decoder too."""
        inner = config.get("text_config")
        outer = {key: config[key] for key in ("bos_token_id", "eos_token_id", "is_causal") if key in config}
        if self.tied is not None:
            outer["tie_word_embeddings"] = config.get("tie_word_embeddings", self.tied)
        return {**(inner if isinstance(inner, dict) else {}), **outer, "model_type": model_type}

    def name(self, name: str) -> str | None:
        """The name of a tensor in the decoder alone; None if it is left out."""
        if name.startswith(self.dropped):
            return None
        for prefix in self.prefixes:
            if name.startswith(prefix):
                return "model." + name.removeprefix(prefix)
        return name.removeprefix("language_model.")


@dataclass(frozen=True, slots=True)
class GgufModel:
    """The model in a GGUF. own: its fields without the architecture's prefix. tensors: names. extra: the values of
    tensors that are not weights (rope factors).
    """

    own: Mapping[str, Any]
    tensors: Container[str]
    extra: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class GgufFields:
    """The fields and tensors that only this family writes to a GGUF."""

    own: Mapping[str, Any]
    extra: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def plus(self, own: Mapping[str, Any]) -> GgufFields:
        """These and more fields, with the same tensors."""
        return GgufFields({**self.own, **own}, self.extra)


@dataclass(frozen=True, slots=True)
class GgufForm(Generic[C]):
    """A family in GGUF, where names come from gguf's own tables.

    claims: whether a file of this architecture belongs to the family. activation: the one that llama.cpp uses; a GGUF
    does not name it. to_config: keys of config.json beyond the common ones. to_fields: the inverse; raises
    UnsupportedError if a GGUF has no field for a value. layout: over Hugging Face's names, which gguf's tables
    translate. ignored: fields that rkf applies, as the reference does, and llama.cpp ignores. unused: whether llama.cpp
    ignores a tensor, by its name there. numbers: tensors of one number in each layer, by their names in it -> the whole
    key of the field in which a GGUF has the numbers of all layers. factors: whether llama.cpp has divisors of the
    frequencies of rope. notes: what rkf computes in another way than llama.cpp, by the fields of a file.
    """

    architecture: str
    to_config: Callable[[GgufModel], Mapping[str, Any]]
    to_fields: Callable[[C], GgufFields]
    layout: Callable[[C], Layout] = lambda config: as_named
    claims: Callable[[Mapping[str, Any]], bool] = lambda own: True
    activation: str = "silu"
    numbers: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    unused: Callable[[C, str], bool] = lambda config, name: False
    factors: bool = False
    notes: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda own: ()


@dataclass(frozen=True, slots=True)
class Family(Generic[C]):
    """A family: its model_type and class name in transformers, its table of keys, its forward pass, the layout of its
    tensors in a Hugging Face checkpoint, and its form in GGUF. unused: whether the reference ignores a tensor.
    prefix: what its names have before "layers."; others: beginnings that stand in its place in some checkpoints.
    """

    name: str
    class_name: str
    keys: type[C]
    program: Callable[[C], Program]
    gguf: GgufForm[C]
    layout: Callable[[C], Layout] = lambda config: as_named
    wrapper: Wrapper | None = None
    unused: Callable[[C, str], bool] = lambda config, name: False
    prefix: str = "model."
    others: tuple[str, ...] = ()

    def own_name(self, config: C, name: str, wrapped: bool) -> str | None:
        """The name of a checkpoint's tensor in the decoder alone; None if it is not one of the decoder's weights."""
        inner = self.wrapper.name(name) if wrapped and self.wrapper else name
        for other in self.others:
            if inner is not None and inner.startswith(other):
                inner = self.prefix + inner.removeprefix(other)
        return None if inner is None or _DERIVED.fullmatch(inner) or self.unused(config, inner) else inner
