"""A GGUF file as a Source: dequantised, renamed, q/k rows in Hugging Face's rope order.

Knows which types become which dense dtype; the header's layout is gguf_header.py's, the tokenizer gguf_tokenizer.py's.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType as Type

from rkf.converters import gguf_tokenizer
from rkf.converters.architectures import check_tensors, family, gguf_config
from rkf.converters.gguf_header import GgufTensor, read_header
from rkf.converters.input_files import files_fingerprint, hash_file
from rkf.converters.names import EMBEDDING, GGUF_ROPE_FACTORS, HEAD, from_gguf, permuted_heads, rope_rows
from rkf.converters.source import TensorSpec
from rkf.errors import SourceError, UnsupportedError
from rkf.format.matrix import DenseTensor, storage_dtype
from rkf.model.first_form import ModelConfig
from rkf.model.metadata import ModelMetadata

# Types that are stored as they came.
_PLAIN = {Type.F32: "f32", Type.F16: "f16", Type.BF16: "bf16"}
# Block types that gguf-py dequantises. Their values are f32: a product of scale and integer (and a sum) has more than
# the 11 bits of f16 or the 8 of bf16, and even a ternary block may overflow f16.
_BLOCKS = frozenset(
    (
        *(Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K),
        *(Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S),
        *(Type.IQ4_NL, Type.IQ4_XS, Type.MXFP4, Type.NVFP4, Type.TQ1_0, Type.TQ2_0),
    )
)
# Dequantised at a time: small enough for the cache, large enough for numpy.
_SLAB_WEIGHTS = 1 << 18

# general.sampling.* -> the names of ModelConfig.generation (Hugging Face's).
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}

# Patterns over the fields that are read -> what they must be; the first that matches decides.
_FIELD_TYPES: tuple[tuple[str, type | tuple[type, ...]], ...] = (
    ("general.architecture", str),
    ("general.sampling.*", (int, float)),
    ("split.count", int),
    ("tokenizer.chat_template", str),
    ("tokenizer.ggml.add_*", bool),
    ("tokenizer.ggml.merges", list),
    ("tokenizer.ggml.model", str),
    ("tokenizer.ggml.pre", str),
    ("tokenizer.ggml.scores", np.ndarray),
    ("tokenizer.ggml.token_type", np.ndarray),
    ("tokenizer.ggml.tokens", list),
    ("tokenizer.ggml.*_token_id", int),
    ("*.rope.scaling.type", str),
    ("*.rope.*", (int, float)),
    ("*.attention.*", (int, float)),
)


class GgufSource:
    """See rkf.converters.source.Source."""

    def __init__(self, path: Path) -> None:
        self.path, self.label = path, path.name
        header = read_header(path)
        fields = dict(header.fields)
        _check_types(fields, self.label)
        _refuse_splits(fields, self.label)
        self._architecture = fields.get("general.architecture")
        family(self._architecture, self.label)
        self._stored = _canonical(dict(header.tensors), self.label)
        if EMBEDDING in self._stored:
            fields[f"{self._architecture}.vocab_size"] = self._stored[EMBEDDING].shape[0]
        factors = header.tensors.get(GGUF_ROPE_FACTORS)
        self.config: ModelConfig = gguf_config(
            fields, None if factors is None else self._values(factors).data, self.label, **_tokens(fields, self.label)
        )
        tied = HEAD not in self._stored
        self.aliases = {HEAD: EMBEDDING} if tied else {}
        self.tensors = {name: _spec(self._stored[name], self.label) for name in sorted(self._stored)}
        check_tensors({name: spec.shape for name, spec in self.tensors.items()}, self.config, tied, self.label)
        self.model = ModelMetadata.of_first_form(self.config.to_metadata(), self.tensors)
        if (count := len(fields.get("tokenizer.ggml.tokens", ()))) > self.config.vocab_size:
            raise SourceError(f"{self.label}: {count} tokens, expected at most one a row of {EMBEDDING}")
        self.tokenizer_json = gguf_tokenizer.from_gguf(fields, self.label)
        self.chat_template: str | None = fields.get("tokenizer.chat_template")

    @cached_property
    def files(self) -> dict[str, str]:
        return {self.path.name: hash_file(self.path)}

    @property
    def fingerprint(self) -> str:
        return files_fingerprint(self.files)

    def read(self, name: str) -> DenseTensor:
        """One tensor. The peak is its values plus one slab of rows."""
        stored = self._stored[name]
        heads = permuted_heads(str(self._architecture), name)
        if heads is None:
            return self._values(stored)
        # A bias is permuted as the rows of its matrix are; in the file it is one row, so it is turned after reading.
        rows = rope_rows(stored.shape[0], getattr(self.config, heads))
        if len(stored.shape) == 1:
            bias = self._values(stored)
            return DenseTensor(bias.dtype, bias.data[rows])
        return self._values(stored, rows)

    def _values(self, tensor: GgufTensor, order: np.ndarray | None = None) -> DenseTensor:
        """The values; `order` picks rows before anything is decoded, as a row is whole blocks in every type."""
        stored = tensor.stored(self.path)
        if order is not None:
            stored = stored[order]
        if tensor.type in _PLAIN:
            dtype = _PLAIN[tensor.type]
            return DenseTensor(dtype, stored.view(storage_dtype(dtype)).reshape(tensor.shape))
        values = np.empty((len(stored), tensor.shape[-1]), np.float32)
        step = max(1, _SLAB_WEIGHTS // tensor.shape[-1])
        with np.errstate(all="ignore"):  # damaged scales give NaN or infinity, which clustering refuses by name
            for start in range(0, len(values), step):
                values[start : start + step] = quants.dequantize(stored[start : start + step], tensor.type)
        return DenseTensor("f32", values.reshape(tensor.shape))


def _canonical(tensors: dict[str, GgufTensor], label: str) -> dict[str, GgufTensor]:
    tensors.pop(GGUF_ROPE_FACTORS, None)
    names = {name: from_gguf(name) for name in tensors}
    for name, canonical in names.items():
        if canonical is None:
            raise UnsupportedError(f"{label}: tensor {name} has no place in a model as rkf knows it")
    return {canonical: tensors[name] for name, canonical in names.items() if canonical is not None}


def _spec(tensor: GgufTensor, label: str) -> TensorSpec:
    if tensor.type not in _PLAIN and tensor.type not in _BLOCKS:
        raise SourceError(f"{label}: tensor {tensor.name}: type {tensor.type.name} can't be dequantised")
    return TensorSpec(tensor.shape, _PLAIN.get(tensor.type, "f32"), tensor.type.name, tensor.stored_bytes)


def _tokens(fields: dict[str, Any], label: str) -> dict[str, Any]:
    """The part of ModelConfig that the tokenizer's fields decide."""
    generation = {ours: fields.get(f"general.sampling.{theirs}") for theirs, ours in _SAMPLING.items()}
    return gguf_tokenizer.special_ids(fields, label) | {
        "generation": {key: float(str(np.float32(value))) for key, value in generation.items() if value is not None}
    }


def _check_types(fields: dict[str, Any], label: str) -> None:
    for key, value in fields.items():
        expected = next((kind for pattern, kind in _FIELD_TYPES if fnmatchcase(key, pattern)), object)
        if not isinstance(value, expected):
            raise SourceError(f"{label}: field {key}: unexpected type {type(value).__name__}")


def _refuse_splits(fields: dict[str, Any], label: str) -> None:
    if fields.get("split.count", 1) > 1:
        raise UnsupportedError(f"{label}: one of {fields['split.count']} parts; join them: llama-gguf-split --merge")
