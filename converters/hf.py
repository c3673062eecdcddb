"""A folder in Hugging Face's layout as a Source: config.json, safetensors, tokenizer.json, templates.

Reads no pickle and runs no code (`auto_map` is ignored). The families know the meaning of the keys.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from rkf.converters.description import Description, checked, describe
from rkf.converters.families.blocks import EMBEDDING, HEAD
from rkf.converters.families.layout import place
from rkf.converters.gguf_tokenizer import load_tokenizer
from rkf.converters.input_files import files_fingerprint, hash_file, read_values
from rkf.converters.mxfp4 import BLOCK, BLOCKS, SCALES
from rkf.converters.mxfp4 import decode as decode_mxfp4
from rkf.converters.source import TensorSpec, read_origin, spec_of
from rkf.converters.special_tokens import special_tokens
from rkf.errors import SourceError
from rkf.format.constants import VERBATIM
from rkf.format.matrix import DenseTensor, from_f32, storage_dtype
from rkf.model.metadata import ModelMetadata

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
# Keys of config.json that mark a quantised checkpoint (GPTQ, AWQ, bitsandbytes, FP8, …). MXFP4 alone is read.
_QUANTISED = ("quantization_config", "compression_config")
_MXFP4 = "MXFP4"
_GENERATION = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class HfSource:
    """See rkf.converters.source.Source."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.label = folder, _label(folder.resolve())
        config = _json(folder / "config.json")
        self._packed = self._is_mxfp4(config)
        self._description = describe(config, self.label)
        self._shards = _shards(folder)
        self._offsets: dict[str, tuple[Path, int]] = {}
        self._stored: dict[str, TensorSpec] = {}
        self._scales: dict[str, tuple[int, ...]] = {}
        ignored: list[str] = []
        for shard, names in self._shards.items():
            ignored += self._add_shard(shard, names)
        self._refuse_lone_blocks()
        self.left_out = self._description.left_out(ignored)
        tokenizer = self._read_tokenizer()
        self.chat_template = self._read_template()
        self.verbatim = {
            name: content
            for name in VERBATIM
            if (folder / name).is_file() and (content := (folder / name).read_bytes())
        }
        self.model = checked(self._model(tokenizer), self.label)
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= self.model.vocab_size:
            raise SourceError(
                f"{self.label}: tokenizer.json has id {largest}, expected ids below {self.model.vocab_size}"
            )
        tied = self._description.keys.tie_word_embeddings
        if tied:
            for name in {name for origin in self._description.layout(HEAD) for name in origin.names}:
                self._stored.pop(name, None)  # some writers store the embedding twice
        self.aliases = {HEAD: EMBEDDING} if tied else {}
        shapes = {name: spec.shape for name, spec in self._stored.items()}
        self._origins = place(self.model.program, self._description.layout, shapes, tied, self.label)
        self.tensors = {name: spec_of(origin, self._stored) for name, origin in self._origins.items()}

    @cached_property
    def files(self) -> dict[str, str]:
        wanted = [*VERBATIM, "tokenizer.json", "chat_template.jinja", "chat_template.json", INDEX]
        paths = [self.folder / name for name in wanted] + list(self._shards)
        return {path.name: hash_file(path) for path in paths if path.is_file()}

    @property
    def fingerprint(self) -> str:
        return files_fingerprint(self.files)

    def _read_template(self) -> str | None:
        """The template from the newest place that has one: its own file, tokenizer_config.json, chat_template.json."""
        own = self.folder / "chat_template.jinja"
        if own.is_file():
            try:
                return own.read_text("utf-8")
            except UnicodeDecodeError as error:
                raise SourceError(f"{own}: not UTF-8 ({error})") from error
        for name in ("tokenizer_config.json", "chat_template.json"):
            template = _json(self.folder / name, optional=True).get("chat_template")
            for entry in template if isinstance(template, list) else ():
                if isinstance(entry, dict) and entry.get("name") == "default":
                    template = entry.get("template")
            if isinstance(template, str):
                return template
        return None

    def read(self, name: str) -> DenseTensor:
        """One tensor, unchanged."""
        return read_origin(self._origins[name], self._stored, self._read_rows)

    def _read_rows(self, name: str, start: int, stop: int) -> DenseTensor:
        """Entries start … stop - 1 along the first axis."""
        spec, (shard, offset) = self._stored[name], self._offsets[name]
        if spec.stored_type == _MXFP4:
            return self._read_mxfp4(name, start, stop)
        dtype, each = storage_dtype(spec.dtype), spec.weights // spec.shape[0]
        data = read_values(shard, dtype, (stop - start) * each, offset + start * each * dtype.itemsize)
        return DenseTensor(spec.dtype, data.reshape(stop - start, *spec.shape[1:]))

    def _read_mxfp4(self, name: str, start: int, stop: int) -> DenseTensor:
        """Entries of a stack in MXFP4; every value is one of bf16."""
        _, rows, cols = self._stored[name].shape
        shape, groups = (stop - start, rows, cols // BLOCK), rows * cols // BLOCK
        found = []
        for stored, each in ((name, groups * BLOCK // 2), (name.removesuffix(BLOCKS) + SCALES, groups)):
            shard, offset = self._offsets[stored]
            found.append(read_values(shard, np.dtype(np.uint8), (stop - start) * each, offset + start * each))
        values = decode_mxfp4(found[0].reshape(*shape, BLOCK // 2), found[1].reshape(shape))
        return DenseTensor("bf16", from_f32(values, "bf16"))

    def _is_mxfp4(self, config: dict[str, Any]) -> bool:
        """Whether some tensors are in MXFP4. SourceError for a checkpoint that is quantised in another way."""
        method = None
        for key in _QUANTISED:
            if config.get(key):
                method = config[key].get("quant_method", "unknown") if isinstance(config[key], dict) else "unknown"
                if method != "mxfp4":
                    raise SourceError(
                        f"{self.label}: already quantised ({key}: {method}); give the original checkpoint"
                    )
        return method is not None

    def _add_packed(self, name: str, entry: dict[str, Any], shard: Path) -> None:
        """Record blocks as the stack of their values, and the place of scales."""
        begin, end = entry["data_offsets"]
        self._offsets[name] = shard, begin
        if name.endswith(SCALES):
            self._scales[name] = tuple(entry["shape"])
            return
        *outer, groups, half = entry["shape"]
        if len(outer) != 2 or half != BLOCK // 2:
            raise SourceError(
                f"{self.label}: tensor {name}: expected [experts, rows, groups, {BLOCK // 2}], got {entry['shape']}"
            )
        self._stored[name] = TensorSpec((*outer, groups * BLOCK), "bf16", _MXFP4, end - begin)

    def _refuse_lone_blocks(self) -> None:
        """Raise SourceError for blocks without scales of their shape."""
        for name, spec in self._stored.items():
            if spec.stored_type == _MXFP4:
                wanted, scales = (*spec.shape[:2], spec.shape[2] // BLOCK), name.removesuffix(BLOCKS) + SCALES
                if self._scales.get(scales) != wanted:
                    got = self._scales.get(scales, "none")
                    raise SourceError(f"{self.label}: tensor {scales}: expected shape {wanted}, got {got}")

    def _add_shard(self, shard: Path, names: set[str] | None) -> list[str]:
        """Record the tensors of a shard; returns the names of those that are not the decoder's. names: those that the
        index places in it, None without an index.
        """
        ignored = []
        entries = _safetensors_header(shard)
        for missing in sorted((names or set()) - entries.keys()):
            raise SourceError(f"{self.label}: {INDEX} places tensor {missing} in {shard.name}, which does not have it")
        for stored_name, entry in entries.items():
            name = self._description.own_name(stored_name)
            if name is None:
                ignored.append(stored_name)
                continue
            if name in self._stored:
                raise SourceError(f"{self.label}: tensor {name} occurs in {shard.name} and in a shard before it")
            if 0 in entry["shape"] or not entry["shape"]:
                raise SourceError(f"{self.label}: tensor {name}: expected values, got shape {entry['shape']}")
            if self._packed and entry["dtype"] == "U8" and name.endswith((BLOCKS, SCALES)):
                self._add_packed(name, entry, shard)
                continue
            if entry["dtype"] not in _DTYPES:
                raise SourceError(
                    f"{self.label}: tensor {name}: expected dtype BF16, F16 or F32, got {entry['dtype']}; "
                    "give the original checkpoint"
                )
            begin, end = entry["data_offsets"]
            self._stored[name] = TensorSpec(tuple(entry["shape"]), _DTYPES[entry["dtype"]], entry["dtype"], end - begin)
            self._offsets[name] = shard, begin
        return ignored

    def _read_tokenizer(self) -> Tokenizer:
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise SourceError(
                f"{self.label}: tokenizer.json is missing; write one with "
                "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        self.tokenizer_json = path.read_bytes()
        return load_tokenizer(self.tokenizer_json, self.label)

    def _model(self, tokenizer: Tokenizer) -> ModelMetadata:
        """The program, and the metadata from the other files."""
        generation = _json(self.folder / "generation_config.json", optional=True)
        settings = _json(self.folder / "tokenizer_config.json", optional=True)
        special_map = _json(self.folder / "special_tokens_map.json", optional=True)
        special = special_tokens(settings, special_map, tokenizer)
        bos, ends = _begin_and_ends(self._description, generation)
        if bos is None and "bos_token" in special:
            bos = special["bos_token"].id
        if "eos_token" in special:
            ends = [*ends, special["eos_token"].id]
        add_bos = settings.get("add_bos_token")
        if not isinstance(add_bos, bool):
            add_bos = tokenizer.encode("a").ids[:1] == [bos]
        return ModelMetadata(
            program=self._description.program,
            context_length=self._description.keys.max_position_embeddings,
            bos_id=bos,
            eos_ids=tuple(end for at, end in enumerate(ends) if end is not None and end not in ends[:at]),
            add_bos=add_bos and bos is not None,
            special_tokens=special,
            generation={key: float(generation[key]) for key in _GENERATION if _is_number(generation.get(key))},
            family=self._description.family.name,
        )


def _begin_and_ends(description: Description, generation: dict[str, Any]) -> tuple[int | None, list[Any]]:
    """The token that begins a text, and those that end an answer: generation_config.json before config.json.

    The default of a family's class may lie beyond a small vocabulary; it then belongs to another model.
    """
    keys, own = description.keys, description.config
    given = generation.get("eos_token_id")
    if given is not None:
        ends = given if isinstance(given, list) else [given]
    else:
        ends = [end for end in keys.eos_token_id if "eos_token_id" in own or end < keys.vocab_size]
    bos = keys.bos_token_id
    beyond = bos is not None and "bos_token_id" not in own and bos >= keys.vocab_size
    return None if beyond else bos, ends


def _label(folder: Path) -> str:
    """The folder's name; for a commit in the hub's cache, the model's id and the commit."""
    if folder.parent.name == "snapshots":
        return f"{folder.parent.parent.name.removeprefix('models--').replace('--', '/')}@{folder.name[:12]}"
    return folder.name


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Every safetensors file of the checkpoint, with the tensors that the index (if there is one) places in it."""
    if (folder / INDEX).is_file():
        return _indexed_shards(folder)
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise SourceError(
            f"{folder}: only pickled weights ({pickles[0]}): pickle runs code and is never read; "
            "save the model with safe_serialization=True"
        )
    raise SourceError(f"{folder}: neither {SINGLE} nor {INDEX}")


def _indexed_shards(folder: Path) -> dict[Path, set[str] | None]:
    weight_map = _json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{folder}: {INDEX} has no weight_map")
    shards: dict[Path, set[str] | None] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise SourceError(f"{folder}: {INDEX}: {name!r} is not the plain name of a safetensors file")
        if not (folder / name).is_file():
            raise SourceError(f"{folder}: shard {name} is missing; {INDEX} names it")
        shards[folder / name] = {tensor for tensor, shard in weight_map.items() if shard == name}
    return shards


def _safetensors_header(path: Path) -> dict[str, Any]:
    """name -> dtype, shape and data_offsets in the file, after the library has checked the whole header."""
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise SourceError(f"{path}: not a safetensors file, truncated or damaged ({error})") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for entry in header.values():
        entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    return header


def _json(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; {} if an optional file is absent."""
    if not path.is_file():
        if optional:
            return {}
        raise SourceError(f"{path.parent}: {path.name} is missing; expected a Hugging Face folder")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
