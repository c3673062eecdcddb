"""A GGUF file as a Source: dequantised, renamed, q/k rows in Hugging Face's rope order.

Knows which types become which dense dtype. gguf_header.py knows the header's layout, gguf_tokenizer.py the tokenizer,
and the families the meaning of fields and tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from rkf.converters import gguf_tokenizer
from rkf.converters.description import Description, checked, describe
from rkf.converters.families import family_of_gguf
from rkf.converters.families.blocks import EMBEDDING, HEAD
from rkf.converters.families.family import GgufModel
from rkf.converters.families.gguf_config import config_of
from rkf.converters.families.gguf_rope import EXTRA
from rkf.converters.families.layout import place
from rkf.converters.gguf_header import GgufHeader, GgufTensor, read_header
from rkf.converters.input_files import files_fingerprint, hash_file
from rkf.converters.source import TensorSpec, read_origin, spec_of
from rkf.errors import SourceError, UnsupportedError, naming
from rkf.format.matrix import DenseTensor, storage_dtype
from rkf.model.metadata import ModelMetadata
from rkf.model.program import layer_prefix

# Types that are stored unchanged.
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
# Weights dequantised at a time: few enough for the cache, enough for numpy.
_SLAB_WEIGHTS = 1 << 18

# general.sampling.* -> the names of ModelMetadata.generation (Hugging Face's).
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}

# Layers after the last, which predict several tokens at once; block_count includes them.
_EXTRA_LAYERS = "nextn_predict_layers"
_LAYER = re.compile(r"blk\.(\d{1,9})\.")

# Fields that have one number, or one for each layer.
_BY_LAYER = (
    *("attention.head_count", "attention.head_count_kv", "feed_forward_length"),
    *("expert_used_count", "expert_feed_forward_length"),
)

# Patterns over the fields that are read -> their required types; the first match decides.
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
    (f"*.{_EXTRA_LAYERS}", int),
    ("*.rope.scaling.type", str),
    ("*.rope.dimension_sections", np.ndarray),
    ("*.rope.*", (int, float)),
    ("*.attention.head_count*", (int, np.ndarray)),
    ("*.attention.sliding_window_pattern", (int, np.ndarray)),
    ("*.attention.recurrent_layers", np.ndarray),
    ("*.attention.*", (int, float)),
)


class GgufSource:
    """See rkf.converters.source.Source."""

    def __init__(self, path: Path) -> None:
        self.path, self.label = path, path.name
        self.left_out: tuple[str, ...] = ()
        header = read_header(path)
        fields = dict(header.fields)
        _check_types(fields, self.label)
        _refuse_splits(fields, self.label)
        own = self._own_fields(header, fields)
        config = self._config(header, own)
        described = describe(config, self.label)
        unused = described.family.gguf.unused
        layers, more = described.keys.num_hidden_layers, any(key.endswith(f".{_EXTRA_LAYERS}") for key in fields)
        self._tensors = {
            name: tensor
            for name, tensor in header.tensors.items()
            if name not in EXTRA and not unused(described.keys, name) and not (more and _is_beyond(name, layers))
        }
        self._numbers = _numbers(described, fields, self.label)
        self._stored = {name: _spec(tensor, self.label) for name, tensor in self._tensors.items()}
        self._stored |= {name: TensorSpec((1,), "f32", "F32", 4) for name in self._numbers}
        self.model = checked(
            ModelMetadata(
                program=described.program,
                context_length=described.keys.max_position_embeddings,
                family=described.family.name,
                **_tokens(fields, self.label),
            ),
            self.label,
        )
        tied = described.keys.tie_word_embeddings
        self.aliases = {HEAD: EMBEDDING} if tied else {}
        shapes = {name: spec.shape for name, spec in self._stored.items()}
        self._origins = place(self.model.program, described.gguf_layout, shapes, tied, self.label)
        self.tensors = {name: spec_of(origin, self._stored) for name, origin in self._origins.items()}
        if (count := len(fields.get("tokenizer.ggml.tokens", ()))) > self.model.vocab_size:
            raise SourceError(f"{self.label}: {count} tokens, expected at most one a row of {EMBEDDING}")
        self.notes = tuple(
            f"{key} {own[key]} is applied, as the reference of {described.family.name} does; llama.cpp ignores it here"
            for key in described.family.gguf.ignored
            if own.get(key)
        )
        self.tokenizer_json = gguf_tokenizer.from_gguf(fields, self.label)
        self.chat_template: str | None = fields.get("tokenizer.chat_template")
        pad = self.model.special_tokens.get("pad_token")
        told = {
            "bos_token_id": self.model.bos_id,
            "eos_token_id": list(self.model.eos_ids),
            "pad_token_id": None if pad is None else pad.id,  # some classes have a default past a small vocabulary
        }
        self.verbatim = {"config.json": json.dumps(config | told, indent=2).encode()}

    def _own_fields(self, header: GgufHeader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the architecture, without its prefix."""
        architecture = fields.get("general.architecture")
        own = {key.removeprefix(f"{architecture}."): each for key, each in fields.items()}
        own |= {key: each[0].item() for key, each in own.items() if key in _BY_LAYER and _is_uniform(each)}
        if isinstance(own.get("block_count"), int):
            own["block_count"] -= own.get(_EXTRA_LAYERS, 0)
        if (table := header.tensors.get("token_embd.weight")) is not None:
            own["vocab_size"] = table.shape[0]
        return own

    def _config(self, header: GgufHeader, own: Mapping[str, Any]) -> dict[str, Any]:
        """The contents of a config.json for this file. own: see _own_fields."""
        architecture = header.fields.get("general.architecture")
        extra = {name: self._values(header.tensors[name]).decode() for name in EXTRA if name in header.tensors}
        with naming(Path(self.label)):
            return config_of(family_of_gguf(architecture, own), GgufModel(own, header.tensors, extra))

    @cached_property
    def files(self) -> dict[str, str]:
        return {self.path.name: hash_file(self.path)}

    @property
    def fingerprint(self) -> str:
        return files_fingerprint(self.files)

    def read(self, name: str) -> DenseTensor:
        """One tensor. The peak is its values plus one slab of rows, or twice the values if rows are permuted."""
        return read_origin(self._origins[name], self._stored, self._read_rows)

    def _read_rows(self, name: str, start: int, stop: int) -> DenseTensor:
        """Entries start … stop - 1 along the first axis."""
        if name in self._numbers:
            return DenseTensor("f32", self._numbers[name])
        return self._values(self._tensors[name], start, stop)

    def _values(self, tensor: GgufTensor, start: int = 0, stop: int | None = None) -> DenseTensor:
        """The values of entries start … stop - 1 along the first axis."""
        if len(tensor.shape) == 1:
            whole = self._rows(tensor, 0, 1, tensor.shape)
            return DenseTensor(whole.dtype, whole.data[start:stop])
        stop = tensor.shape[0] if stop is None else stop
        each = prod(tensor.shape[1:-1])
        return self._rows(tensor, start * each, stop * each, (stop - start, *tensor.shape[1:]))

    def _rows(self, tensor: GgufTensor, start: int, stop: int, shape: tuple[int, ...]) -> DenseTensor:
        stored = tensor.stored(self.path, start, stop)
        if tensor.type in _PLAIN:
            dtype = _PLAIN[tensor.type]
            return DenseTensor(dtype, stored.view(storage_dtype(dtype)).reshape(shape))
        values = np.empty((len(stored), tensor.shape[-1]), np.float32)
        step = max(1, _SLAB_WEIGHTS // tensor.shape[-1])
        with np.errstate(all="ignore"):  # damaged scales give NaN or infinity; clustering refuses them by name
            for at in range(0, len(values), step):
                values[at : at + step] = quants.dequantize(stored[at : at + step], tensor.type)
        return DenseTensor("f32", values.reshape(shape))


def _numbers(described: Description, fields: Mapping[str, Any], label: str) -> dict[str, NDArray[np.float32]]:
    """Tensors that fields hold with one number for each layer, f32[1] each, by their full names."""
    form, found = described.family.gguf, dict[str, NDArray[np.float32]]()
    for name, field in form.numbers.items():
        values = fields.get(field)
        layers = described.keys.num_hidden_layers
        if not isinstance(values, np.ndarray) or values.shape != (layers,) or values.dtype.kind != "f":
            raise SourceError(f"{label}: field {field}: expected {layers} numbers, one for each layer")
        found |= {layer_prefix(layer) + name: values[layer : layer + 1].astype(np.float32) for layer in range(layers)}
    return found


def _is_uniform(value: Any) -> bool:
    """Whether a field has the same integer for each layer."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size > 0 and bool(np.ptp(value) == 0)


def _is_beyond(name: str, layers: int) -> bool:
    """Whether a tensor is of a layer after these."""
    match = _LAYER.match(name)
    return match is not None and int(match[1]) >= layers


def _spec(tensor: GgufTensor, label: str) -> TensorSpec:
    if tensor.type not in _PLAIN and tensor.type not in _BLOCKS:
        raise SourceError(f"{label}: tensor {tensor.name}: type {tensor.type.name} cannot be dequantised")
    return TensorSpec(tensor.shape, _PLAIN.get(tensor.type, "f32"), tensor.type.name, tensor.stored_bytes)


def _tokens(fields: dict[str, Any], label: str) -> dict[str, Any]:
    """The part of ModelMetadata that the tokenizer's fields determine."""
    generation = {ours: fields.get(f"general.sampling.{theirs}") for theirs, ours in _SAMPLING.items()}
    return gguf_tokenizer.special_ids(fields, label) | {
        "special_tokens": gguf_tokenizer.special_tokens(fields, label),
        "generation": {key: float(str(np.float32(value))) for key, value in generation.items() if value is not None},
    }


def _check_types(fields: dict[str, Any], label: str) -> None:
    for key, value in fields.items():
        expected = next((kind for pattern, kind in _FIELD_TYPES if fnmatchcase(key, pattern)), object)
        if not isinstance(value, expected):
            raise SourceError(f"{label}: field {key}: unexpected type {type(value).__name__}")


def _refuse_splits(fields: dict[str, Any], label: str) -> None:
    if fields.get("split.count", 1) > 1:
        raise UnsupportedError(f"{label}: one of {fields['split.count']} parts; join them: llama-gguf-split --merge")
