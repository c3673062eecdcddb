"""An .rkf file to other formats: a Hugging Face folder, or a GGUF. One tensor in memory at a time.

Exports hold the decoded weights, rounded to the source's dtype (Hugging Face) or to f16 (GGUF), unless another one is
asked for. For a dense file in that dtype this is exact. The file carries the checkpoint's own configuration, which
determines names and layouts.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from rkf.converters.description import Description, describe
from rkf.converters.families import first_form_config
from rkf.converters.families.blocks import HEAD
from rkf.converters.families.gguf_config import fields_of
from rkf.converters.families.layout import Assembly, assemblies
from rkf.converters.families.layout_transforms import Shape
from rkf.converters.generation import PENALTY, SAMPLING
from rkf.converters.quantised import KEYS as QUANTISATION_KEYS
from rkf.converters.tokenizer_export import gguf_fields, parsed, token_text
from rkf.errors import StructureError, UnsupportedError, UsageError, naming
from rkf.file.atomic import alone, replacing, reporting
from rkf.file.container import Container, open_file, refuse_input
from rkf.file.private import private_folder
from rkf.file.scratch import remove_folder, scratch
from rkf.format.constants import CHAT_TEMPLATE, TOKENIZER, VERBATIM
from rkf.format.matrix import F32, from_f32
from rkf.model.metadata import ModelMetadata
from rkf.model.op import KERNEL, ROUTER, VECTOR
from rkf.model.program import layer_prefix
from rkf.model.rotation import rotations
from rkf.numbers.hadamard_blocks import transformed

_SAFETENSORS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
TORCH_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_BYTES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I64": 8}
_F16, _F32 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32
# The types that the gguf package can write: name -> type of a matrix, type of a file.
GGUF_TYPES = {
    "f32": (_F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (_F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (gguf.GGMLQuantizationType.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (gguf.GGMLQuantizationType.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (gguf.GGMLQuantizationType.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}


def export_hf(path: str | Path, folder: str | Path, *, dtype: str | None = None) -> None:
    """Write the model at `path` as a folder that transformers loads: safetensors, config.json, tokenizer, template.

    dtype: "bf16", "f16" or "f32" for all tensors (None: the source's). Raises UsageError if the folder exists and is
    not empty, UnsupportedError for a file without the configuration of a known family and for weights that do not fit
    the dtype, and the errors of opening `path`.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists already: choose another name for the folder")
    with open_file(path) as file, staged_folder(folder) as staging:
        exported = Exported(file, dtype)
        found = assemblies(exported.description.layout, exported.shapes)
        write_safetensors(staging / "model.safetensors", map(exported.stored, found))
        for name, content in exported.configuration().items():
            write_file(staging / name, content)
        file.refuse_changed()


def export_gguf(path: str | Path, out: str | Path, *, type_name: str = "f16", force: bool = False) -> tuple[str, ...]:
    """Write the model at `path` as a GGUF that llama.cpp loads. Returns a line for each rule that a GGUF cannot keep.

    type_name: the type of matrices, of GGUF_TYPES; those whose rows do not fill its blocks are f16. Vectors and routers
    are f32. Raises UsageError if `out` exists and `force` is not given, UnsupportedError for a model or a tokenizer
    that GGUF cannot express, and the errors of opening `path`.
    """
    out = Path(out)
    refuse_input(out, path)
    with open_file(path) as file, replacing(out, force) as output:
        with naming(file.path):
            model = _GgufModel(Exported(file), type_name)
        for part in chain([model.head()], model.tensors()):
            output.write(part)
            output.write(bytes(-output.position % gguf.GGUF_DEFAULT_ALIGNMENT))
        file.refuse_changed()
    return tuple(model.notes)


class Exported:
    """A file's model, with the configuration that determines the layout of its checkpoint. dtype: of all its tensors,
    in place of the source's.
    """

    def __init__(self, file: Container, dtype: str | None = None) -> None:
        if file.model is None:
            raise UnsupportedError(f"{file.path}: its metadata has no model, so it cannot be exported")
        self.file, self.model = file, file.model
        stored = {name: entry for name, entry in file.tensors.items() if entry.kind != "alias"}
        self.shapes = {name: entry.shape for name, entry in stored.items()}
        self.dtypes = {name: entry.source_dtype for name, entry in stored.items()}
        self.config = self._config()
        tied = HEAD not in self.shapes  # a head of its own may lie beside the word "tied"
        self.description: Description = describe(self.config, str(file.path), tied)
        if set(self.description.program.weights()) != set(self.model.program.weights()):
            raise StructureError(f"{file.path}: config.json describes other tensors than the program reads")
        self._dtype = dtype
        self._blocks = rotations(self.model.program)
        self._last: tuple[str, F32] | None = None

    def _config(self) -> dict[str, Any]:
        blob = self.file.blob("config.json")
        if blob is not None:
            try:
                found = json.loads(blob)
            except (ValueError, RecursionError) as error:
                raise StructureError(f"{self.file.path}: config.json: not JSON ({error})") from error
            if not isinstance(found, dict):
                raise StructureError(f"{self.file.path}: config.json: expected an object")
            return found
        metadata = self.file.metadata["model"]
        if "program" in metadata:
            raise UnsupportedError(f"{self.file.path}: it carries no config.json, so it cannot be exported")
        return first_form_config.config_of(metadata, self.dtypes)

    def decode(self, name: str) -> F32:
        """A tensor of the checkpoint: rows that the program rotates are turned back. The last one is cached, because
        the experts of a stack are written one by one.
        """
        if self._last is None or self._last[0] != name:
            self._last = None  # free it before the next one is decoded
            values = self.file.decode(name)
            self._last = name, transformed(values, self._blocks[name]) if name in self._blocks else values
        return self._last[1]

    def dtype(self, assembly: Assembly) -> str:
        """The dtype asked for, or that of its parts in the checkpoint; f32 if they differ."""
        if self._dtype is not None:
            return self._dtype
        found = {self.dtypes[part.tensor] for part in assembly.parts}
        return found.pop() if len(found) == 1 else "f32"

    def stored(self, assembly: Assembly) -> WrittenTensor:
        """A tensor of the checkpoint, in its own dtype."""
        dtype = self.dtype(assembly)

        def data() -> NDArray[Any]:
            with naming(self.file.path):
                return _rounded(assembly.values(self.decode), dtype, assembly)

        return WrittenTensor(assembly.name, _SAFETENSORS[dtype], assembly.shape, data)

    def configuration(self) -> dict[str, bytes]:
        """The files beside the tensors: the checkpoint's own; missing ones are made from the metadata."""
        made = {
            "config.json": self._plain_config() if not self.description.wrapped else self._decoder_config(),
            "generation_config.json": _generation_config(self.model),
            "tokenizer_config.json": _tokenizer_config(self.model, self._token_text()),
        }
        found = {name: _json(content) for name, content in made.items()}
        kept = {name: blob for name in VERBATIM if (blob := self.file.blob(name)) is not None}
        if self.description.wrapped or any(key in self.config for key in QUANTISATION_KEYS):
            del kept["config.json"]
        if self._dtype is not None:
            config = json.loads((found | kept)["config.json"])
            config.pop("torch_dtype", None)
            kept["config.json"] = _json({**config, "dtype": TORCH_NAMES[self._dtype]})
        text = {name: blob for name in (TOKENIZER, CHAT_TEMPLATE) if (blob := self.file.blob(name)) is not None}
        return found | kept | text

    def _token_text(self) -> dict[int, str]:
        with naming(self.file.path):
            return token_text(parsed(self.file.blob(TOKENIZER) or b"", self.model.vocab_size))

    def _plain_config(self) -> dict[str, Any]:
        return _unpacked(self.config)

    def _decoder_config(self) -> dict[str, Any]:
        """The config.json of the decoder alone; nothing else is left of a model that contained it."""
        dtype = self.config.get("dtype", self.config.get("torch_dtype"))
        own = {"architectures": [self.description.family.class_name], **_unpacked(self.description.config)}
        return own if dtype is None else {"dtype": dtype, **own}


def _unpacked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json without the packing of the source's tensors, which are written unpacked."""
    return {key: value for key, value in config.items() if key not in QUANTISATION_KEYS}


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A new folder that replaces `folder` at the end. An error leaves nothing of it, and what a killed process has left
    is removed.
    """
    own = folder.with_name(f".{folder.name}.staging")
    with alone(folder), ExitStack() as stack:
        private_folder(own)
        stack.callback(remove_folder, own)
        staging = own / folder.name  # the result has the user's usual mode
        remove_folder(staging)
        with reporting(folder):
            staging.mkdir()
        yield staging
        with reporting(folder):
            staging.replace(folder)


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """A tensor of a safetensors file to be written. dtype: the format's name; data: makes its bytes."""

    name: str
    dtype: str
    shape: Shape
    data: Callable[[], NDArray[Any]]


def write_safetensors(path: Path, tensors: Iterable[WrittenTensor]) -> None:
    """Stream tensors into a safetensors file (the library's writer wants all of them in memory).

    Layout: u64 length of the header, JSON header padded with spaces to 8 bytes, tensors without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    tensors = list(tensors)
    end = 0
    for tensor in tensors:
        begin, end = end, end + prod(tensor.shape) * _BYTES[tensor.dtype]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor.data()))


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_file(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def _generation_config(model: ModelMetadata) -> dict[str, Any]:
    given = {name: value for name, value in model.generation.items() if name in (*SAMPLING, PENALTY)}
    if given.get("temperature", 1) == 0:  # greedy; transformers has no temperature of 0
        given = {name: value for name, value in given.items() if name == PENALTY}
    options: dict[str, Any] = dict(given)
    if "top_k" in given:
        options["top_k"] = min(int(given["top_k"]), model.vocab_size)  # transformers accepts only an integer
    if given.keys() - {PENALTY}:
        options["do_sample"] = True
    return {"bos_token_id": model.bos_id, "eos_token_id": list(model.eos_ids), **options}


def _tokenizer_config(model: ModelMetadata, text: Mapping[int, str]) -> dict[str, Any]:
    settings = {
        "add_bos_token": model.add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    ids = {"bos_token": model.bos_id, "eos_token": next(iter(model.eos_ids), None)}
    settings |= {name: text[index] for name, index in ids.items() if index is not None and index in text}
    return settings | {name: token.text for name, token in model.special_tokens.items()}


class _GgufModel:
    """A GGUF being written: its head, and the data of its tensors in the head's order."""

    def __init__(self, exported: Exported, type_name: str) -> None:
        self.notes: list[str] = []
        self._exported = exported
        self._type, self._file_type = GGUF_TYPES[type_name]
        description = exported.description
        self._architecture = description.family.gguf.architecture
        fields = fields_of(description.family, description.keys)
        self._fields, self._extra = fields.own, fields.extra
        exact = (ROUTER, KERNEL, VECTOR)
        self._exact = {name for name, _, role in description.program.weights() if role in exact}
        self._numbers: dict[str, list[float]] = {}
        apart: set[str] = set()
        for name, field in description.family.gguf.numbers.items():
            names = [layer_prefix(layer) + name for layer in range(description.program.layers)]
            self._numbers[field] = [float(exported.decode(each)[0]) for each in names]
            apart.update(names)
        self._tensors = [
            each for each in assemblies(description.gguf_layout, exported.shapes) if each.name not in apart
        ]

    def head(self) -> bytes:
        """Everything before the tensors. The library writes it to its own file, which it cannot lock or report on."""
        file = self._exported.file
        with scratch() as folder, naming(file.path):
            path = folder / "head.gguf"
            with closing(gguf.GGUFWriter(path, self._architecture)) as writer:
                writer.add_file_type(self._file_type)
                if self._type not in (_F32, _F16, gguf.GGMLQuantizationType.BF16):
                    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
                for key, value in self._fields.items():
                    _add_field(writer, f"{self._architecture}.{key}", value)
                for key, numbers in self._numbers.items():
                    writer.add_array(key, numbers)
                self.notes = gguf_fields(writer, file.blob(TOKENIZER) or b"", self._exported.model)
                _add_sampling(writer, self._exported.model)
                template = file.blob(CHAT_TEMPLATE)
                if template is not None:
                    writer.add_chat_template(template.decode())
                for tensor in self._tensors:
                    kind = self._kind(tensor)
                    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
                    size = prod(tensor.shape) // block * block_bytes
                    writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
                for name, factors in self._extra.items():
                    writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
                _refuse_numbers(writer)
                with reporting(path):
                    writer.write_header_to_file()
                    writer.write_kv_data_to_file()
                    writer.write_ti_data_to_file()
            return path.read_bytes()

    def tensors(self) -> Iterator[np.ndarray]:
        """The data of every tensor."""
        for tensor in self._tensors:
            weights = tensor.values(self._exported.decode)
            kind = self._kind(tensor)
            with naming(self._exported.file.path):
                if kind not in (_F32, gguf.GGMLQuantizationType.BF16):
                    _refuse_beyond_f16(weights, tensor)  # the dtype of blocks' scales, too
                yield weights if kind == _F32 else gguf.quants.quantize(weights, kind)
        yield from self._extra.values()

    def _kind(self, tensor: Assembly) -> gguf.GGMLQuantizationType:
        """Vectors stay f32, also those of experts and kernels of convolutions; llama.cpp reads them in no other dtype.

        So do routers: rounding would send tokens to other experts.
        """
        if len(tensor.shape) == 1 or tensor.parts[0].tensor in self._exact:
            return _F32
        block, _ = gguf.GGML_QUANT_SIZES[self._type]
        return self._type if tensor.shape[-1] % block == 0 else _F16


def _refuse_numbers(writer: gguf.GGUFWriter) -> None:
    """Raise UnsupportedError for a number that its type in a GGUF cannot hold."""
    for key, field in (item for fields in writer.kv_data for item in fields.items()):
        form = writer._simple_value_packing.get(field.type)
        if form is None:  # a text or an array
            continue
        try:
            struct.pack(f"<{form}", field.value)
        except (OverflowError, struct.error) as error:
            raise UnsupportedError(f"{key}: {field.value} is no {field.type.name.lower()}, as a GGUF has it") from error


def _add_sampling(writer: gguf.GGUFWriter, model: ModelMetadata) -> None:
    """Add the sampling options that the authors recommend."""
    add: dict[str, Callable[[Any], None]] = {
        "temperature": writer.add_sampling_temp,
        "top_k": lambda number: writer.add_sampling_top_k(min(int(number), model.vocab_size)),
        "top_p": writer.add_sampling_top_p,
        "min_p": writer.add_sampling_min_p,
        PENALTY: writer.add_sampling_penalty_repeat,
    }
    for name, value in model.generation.items():
        if name in add:
            add[name](value)


def _add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        str: gguf.GGUFValueType.STRING,
        float: gguf.GGUFValueType.FLOAT32,
        int: gguf.GGUFValueType.UINT32,
    }
    writer.add_key_value(key, value, kinds[type(value)])


def _rounded(weights: np.ndarray, dtype: str, tensor: Assembly) -> NDArray[Any]:
    """Weights in a dtype that holds them."""
    if dtype == "f16":
        _refuse_beyond_f16(weights, tensor)
    return from_f32(weights, dtype)


def _refuse_beyond_f16(weights: np.ndarray, tensor: Assembly) -> None:
    if not np.isfinite(from_f32(weights, "f16")).all():
        name = tensor.parts[0].tensor
        raise UnsupportedError(f"{name}: weights up to {np.abs(weights).max():g} do not fit f16: choose bf16 or f32")
