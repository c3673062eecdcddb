"""A GGUF file as a Source: dequantised, renamed, q/k rows in Hugging Face's rope order.

Knows which types become which dense dtype. gguf_header.py knows the header's layout, gguf_tokenizer.py the tokenizer,
and the families the meaning of fields and tensors.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from glob import escape
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from rkf.converters.description import Description, checked, describe
from rkf.converters.families import family_of_gguf
from rkf.converters.families.blocks import EMBEDDING, HEAD
from rkf.converters.families.family import GgufModel
from rkf.converters.families.gguf_config import config_of
from rkf.converters.families.gguf_rope import EXTRA
from rkf.converters.families.layout import place, surplus
from rkf.converters.gguf_header import GgufHeader, GgufTensor, GgufTexts, read_header
from rkf.converters.gguf_tokenizer import GgufTokenizer
from rkf.converters.input_files import files_fingerprint, hash_file, shown_name
from rkf.converters.source import TensorSpec, read_origin, spec_of
from rkf.errors import SourceError, UnsupportedError, naming
from rkf.file.identity import identity, refuse_changed
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

# general.type, or the architecture -> what a file of llama.cpp is that is no model.
_NO_MODELS = {
    "adapter": "a LoRA adapter: merge it into its model first",
    "controlvector": "a control vector, which rkf cannot apply",
    "imatrix": "statistics for quantisation (an imatrix)",
    "mmproj": "the part of a model that sees or hears: give the file of the language model",
}

# Layers after the last, which predict several tokens at once; block_count includes them.
_EXTRA_LAYERS = "nextn_predict_layers"
_LAYER = re.compile(r"blk\.([0-9]{1,9})\.")

# Fields that have one number, or one for each layer.
_BY_LAYER = (
    *("attention.head_count", "attention.head_count_kv", "feed_forward_length"),
    *("expert_used_count", "expert_feed_forward_length"),
)

_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "a list of texts": lambda value: isinstance(value, GgufTexts),
    "an integer": lambda value: type(value) is int,
    "true or false": lambda value: type(value) is bool,
    "a finite number": lambda value: type(value) is int or (type(value) is float and _is_finite(value)),
    "a list of numbers": lambda value: isinstance(value, np.ndarray) and _is_finite(value),
    "a list of integers": lambda value: isinstance(value, np.ndarray) and value.dtype.kind in "iu",
}
# Patterns over the fields that are read -> their types; the first match decides. {} is the architecture, whose other
# fields are numbers.
_FIELD_TYPES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("general.architecture", ("a text",)),
    ("general.type", ("a text",)),
    ("general.sampling.*", ("a finite number",)),
    ("split.count", ("an integer",)),
    ("tokenizer.chat_template", ("a text",)),
    ("tokenizer.ggml.add_*", ("true or false",)),
    ("tokenizer.ggml.merges", ("a list of texts",)),
    ("tokenizer.ggml.model", ("a text",)),
    ("tokenizer.ggml.pre", ("a text",)),
    ("tokenizer.ggml.scores", ("a list of numbers",)),
    ("tokenizer.ggml.token_type", ("a list of integers",)),
    ("tokenizer.ggml.tokens", ("a list of texts",)),
    ("tokenizer.ggml.*_token_id", ("an integer",)),
    (f"*.{_EXTRA_LAYERS}", ("an integer",)),
    ("{}.block_count", ("an integer",)),
    ("*.rope.scaling.type", ("a text",)),
    ("*.tensor_data_layout", ("a text",)),  # of old files; it says nothing that is read
    ("*.rope.dimension_sections", ("a list of numbers",)),
    ("*.attention.sliding_window_pattern", ("an integer", "a list of numbers")),
    ("*.attention.recurrent_layers", ("a list of numbers",)),
    *((f"*.{field}", ("an integer", "a list of numbers")) for field in _BY_LAYER),
    ("{}.*", ("a finite number", "true or false")),
)


class GgufSource:
    """See rkf.converters.source.Source."""

    def __init__(self, path: Path) -> None:
        self.path, self.label = path, shown_name(path)
        self.left_out: tuple[str, ...] = ()
        self._before = {path: identity(path)}
        header = read_header(path)
        fields = dict(header.fields)
        _refuse_other_files(fields, self.label)
        _check_types(fields, self.label)
        _refuse_splits(fields, self.label)
        own = self._own_fields(header, fields)
        config = self._config(header, own)
        if not header.tensors:
            raise SourceError(f"{self.label}: no tensors, expected the weights of a model (is it a vocabulary alone?)")
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
        rows = described.keys.vocab_size
        if (count := len(fields.get("tokenizer.ggml.tokens", ()))) > rows:
            raise SourceError(f"{self.label}: {count} tokens, expected at most {rows}, one a row of {EMBEDDING}")
        tokenizer = GgufTokenizer(fields, self.label)
        self.model = checked(
            ModelMetadata(
                program=described.program,
                context_length=described.keys.max_position_embeddings,
                bos_id=tokenizer.bos_id,
                eos_ids=tokenizer.eos_ids,
                add_bos=tokenizer.add_bos,
                special_tokens=tokenizer.special_tokens,
                generation=_generation(fields),
                family=described.family.name,
            ),
            self.label,
        )
        tied = described.keys.tie_word_embeddings
        self.aliases = {HEAD: EMBEDDING} if tied else {}
        shapes = {name: spec.shape for name, spec in self._stored.items()}
        self._origins = place(self.model.program, described.gguf_layout, shapes, tied, self.label)
        if unread := surplus(self._origins, shapes, self.label):
            raise UnsupportedError(
                f"{self.label}: tensor {unread[0]} is not part of the model that the configuration describes"
            )
        self.tensors = {name: spec_of(origin, self._stored) for name, origin in self._origins.items()}
        self.tokenizer_json = tokenizer.to_json()
        applied = (
            f"{key} {own[key]} is applied, as the reference of {described.family.name} does; llama.cpp ignores it here"
            for key in described.family.gguf.ignored
            if own.get(key)
        )
        self.notes = (*tokenizer.notes, *applied, *described.family.gguf.notes(own))
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
        layers = own.get("block_count")
        for key in _BY_LAYER:
            if isinstance(own.get(key), np.ndarray) and len(own[key]) != layers:
                raise SourceError(f"{self.label}: field {key}: expected {layers} numbers, one for each layer")
        own |= {key: each[0].item() for key, each in own.items() if key in _BY_LAYER and _is_uniform(each)}
        if layers is not None:
            own["block_count"] = layers - own.get(_EXTRA_LAYERS, 0)
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
        return {self.label: hash_file(self.path)}

    @property
    def fingerprint(self) -> str:
        return files_fingerprint(self.files)

    def refuse_changed(self) -> None:
        refuse_changed(self._before)

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


def _generation(fields: Mapping[str, Any]) -> dict[str, float]:
    """The sampling options that the file recommends, in the digits that its f32 stands for."""
    found = {ours: fields.get(f"general.sampling.{theirs}") for theirs, ours in _SAMPLING.items()}
    return {key: float(str(np.float32(value))) for key, value in found.items() if value is not None}


def _is_finite(value: Any) -> bool:
    """Whether it is finite as f32, the type in which llama.cpp reads numbers."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.asarray(value).astype(np.float32)).all())


def _check_types(fields: Mapping[str, Any], label: str) -> None:
    architecture = str(fields.get("general.architecture"))
    patterns = [(pattern.replace("{}", escape(architecture)), types) for pattern, types in _FIELD_TYPES]
    for key, value in fields.items():
        expected = next((types for pattern, types in patterns if fnmatchcase(key, pattern)), ())
        if expected and not any(_TYPES[each](value) for each in expected):
            shown = reprlib.repr(value) if isinstance(value, int | float | str) else f"a list of {len(value)}"
            raise SourceError(f"{label}: field {key}: expected {' or '.join(expected)}, got {shown}")


def _refuse_other_files(fields: Mapping[str, Any], label: str) -> None:
    """Refuse what is no model by what it is; its fields are not those of a model."""
    for key in ("general.type", "general.architecture"):
        kind = fields.get(key)
        if isinstance(kind, str) and kind in _NO_MODELS:
            raise UnsupportedError(f"{label}: not a model but {_NO_MODELS[kind]}")


def _refuse_splits(fields: dict[str, Any], label: str) -> None:
    if fields.get("split.count", 1) > 1:
        raise UnsupportedError(f"{label}: one of {fields['split.count']} parts; join them: llama-gguf-split --merge")
