"""A folder in Hugging Face's layout as a Source: config.json, safetensors, tokenizer.json, templates.

Reads no pickle and runs no code (`auto_map` is ignored). The families know the meaning of the keys.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from rkf.converters.description import Description, checked, describe
from rkf.converters.families.blocks import EMBEDDING, HEAD
from rkf.converters.families.layout import place
from rkf.converters.gguf_tokenizer import load_tokenizer
from rkf.converters.input_files import files_fingerprint, hash_file, read_json
from rkf.converters.quantised import StoredWeight, quantisation, weights_of
from rkf.converters.shards import INDEX, StoredTensor, shards, tensors_of
from rkf.converters.source import read_origin, spec_of
from rkf.converters.special_tokens import special_tokens
from rkf.errors import SourceError, naming
from rkf.format.constants import VERBATIM
from rkf.format.matrix import DenseTensor
from rkf.model.metadata import ModelMetadata

# Weights compared at a time.
_SLAB_WEIGHTS = 1 << 20
_GENERATION = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class HfSource:
    """See rkf.converters.source.Source."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.label = folder, _label(folder.resolve())
        config = read_json(folder / "config.json")
        with naming(Path(self.label)):
            how = quantisation(config)
        self._description = describe(config, self.label)
        self._shards = shards(folder)
        tensors, others = self._own_tensors()
        with naming(Path(self.label)):
            self._weights = weights_of(tensors, how)
        self.left_out = self._description.left_out(others)
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
        tied = self._description.keys.tie_word_embeddings and self._share_head()
        own_head = self._description.keys.tie_word_embeddings and not tied
        self.notes = ("the head differs from the embedding; it is kept, though tie_word_embeddings is true",) * own_head
        self._stored = {name: weight.spec for name, weight in self._weights.items()}
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
            template = read_json(self.folder / name, optional=True).get("chat_template")
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
        return self._weights[name].read(start, stop)

    def _own_tensors(self) -> tuple[dict[str, StoredTensor], list[str]]:
        """The decoder's tensors by their names in the decoder, and the names of all others."""
        found: dict[str, StoredTensor] = {}
        others = []
        for shard, names in self._shards.items():
            tensors = tensors_of(shard)
            for missing in sorted((names or set()) - tensors.keys()):
                raise SourceError(f"{self.label}: {INDEX} places tensor {missing} in {shard.name}; it is not there")
            for stored_name, tensor in tensors.items():
                name = self._description.own_name(stored_name)
                if name is None:
                    others.append(stored_name)
                elif name in found:
                    raise SourceError(f"{self.label}: tensor {name} occurs in {shard.name} and in a shard before it")
                else:
                    found[name] = tensor
        return found, others

    def _share_head(self) -> bool:
        """Whether the head is the embedding's matrix, for a model that says so; one of both may be stored, or both.

        `tie_weights` in transformers/modeling_utils.py decides the same way: a head with other values stays a head.
        """
        heads = [name for origin in self._description.layout(HEAD) for name in origin.names if name in self._weights]
        (table,) = self._description.layout(EMBEDDING)[0].names
        if not heads:
            return True
        if table in self._weights and not _same_values(self._weights[heads[0]], self._weights[table]):
            return False
        self._weights.setdefault(table, self._weights[heads[0]])
        for name in heads:
            del self._weights[name]
        return True

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
        generation = read_json(self.folder / "generation_config.json", optional=True)
        settings = read_json(self.folder / "tokenizer_config.json", optional=True)
        special_map = read_json(self.folder / "special_tokens_map.json", optional=True)
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


def _same_values(one: StoredWeight, other: StoredWeight) -> bool:
    """Whether two matrices hold the same values; reads some rows of both at a time."""
    if one.spec.shape != other.spec.shape:
        return False
    rows = one.spec.shape[0]
    step = max(1, _SLAB_WEIGHTS * rows // one.spec.weights)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if not np.array_equal(one.read(start, stop).decode(), other.read(start, stop).decode()):
            return False
    return True


def _label(folder: Path) -> str:
    """The folder's name; for a commit in the hub's cache, the model's id and the commit."""
    if folder.parent.name == "snapshots":
        return f"{folder.parent.parent.name.removeprefix('models--').replace('--', '/')}@{folder.name[:12]}"
    return folder.name


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
