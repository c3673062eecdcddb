"""A folder in Hugging Face's layout as a Source: config.json, safetensors, tokenizer.json, templates.

Reads no pickle and runs no code (`auto_map` is ignored). The families know the meaning of the keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from rkf.converters import input_files
from rkf.converters.chat_template import FURTHER_TEMPLATE, PROCESSOR_TEMPLATE, other_templates, template_of
from rkf.converters.description import checked, describe
from rkf.converters.ends import ends
from rkf.converters.families.blocks import EMBEDDING, HEAD
from rkf.converters.families.layout import Origin, place, surplus
from rkf.converters.folder_tokenizer import ADDED, FolderTokenizer, some
from rkf.converters.generation import generation_of
from rkf.converters.input_files import files_fingerprint, hash_file, read_bytes, read_json, shown_name
from rkf.converters.quantised import StoredWeight, quantisation, refuse_unreadable, weights_of
from rkf.converters.shards import INDEX, SINGLE, StoredTensor, WeightReader, shards, tensors_of
from rkf.converters.source import read_origin, spec_of
from rkf.errors import SourceError, naming
from rkf.file.identity import identity, refuse_changed
from rkf.format.constants import CHAT_TEMPLATE, TOKENIZER, VERBATIM
from rkf.format.matrix import DenseTensor
from rkf.model.metadata import ModelMetadata

CONFIG, ADAPTER = "config.json", "adapter_config.json"
# Weights compared at a time.
_SLAB_WEIGHTS = 1 << 20


class HfSource:
    """See rkf.converters.source.Source."""

    def __init__(self, folder: Path, weights: WeightReader = input_files, label: str | None = None) -> None:
        """weights: reads the safetensors files of the folder. label: by default the folder's name."""
        self.folder, self.label = folder, label or _label(folder.resolve())
        self._reader = weights
        self._notes: list[str] = []
        # Before any of them is read: every file that may be.
        self._before = {path: identity(path) for path in [*self._named(), *folder.glob("*.safetensors")]}
        self._look_for_adapter()
        config = read_json(folder / CONFIG)
        with naming(Path(self.label)):
            how = quantisation(config)
        self._description = describe(config, self.label)
        self._shards = self._find_shards()
        tensors, foreign = self._own_tensors()
        with naming(Path(self.label)):
            self._weights, self._unreadable = weights_of(tensors, how)
        self.left_out = self._description.left_out(foreign)
        tokenizer = FolderTokenizer(folder, self._description.keys.vocab_size, self.label)
        self._notes += tokenizer.notes
        self.tokenizer_json = tokenizer.json
        self.chat_template = template_of(folder)
        if others := other_templates(folder):
            self._notes.append(f"of several chat templates only the default one is kept, without {some(others)}")
        self.verbatim = {
            name: content for name in VERBATIM if (folder / name).is_file() and (content := read_bytes(folder / name))
        }
        self.model = checked(self._model(tokenizer), self.label)
        said_tied = self._description.keys.tie_word_embeddings
        tied = said_tied and self._share_head()
        if said_tied and not tied:
            self._notes.append("the head differs from the embedding; it is kept, though tie_word_embeddings is true")
        self.aliases = {HEAD: EMBEDDING} if tied else {}
        self._origins = self._place(tied)
        self._stored = {name: self._weights[name].spec for origin in self._origins.values() for name in origin.names}
        self.tensors = {name: spec_of(origin, self._stored) for name, origin in self._origins.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    @cached_property
    def files(self) -> dict[str, str]:
        paths = [*self._named(), *self._shards]
        readers = {path: self._reader.hash_file if path in self._shards else hash_file for path in paths}
        return {
            path.relative_to(self.folder).as_posix(): hashed(path) for path, hashed in readers.items() if path.is_file()
        }

    @property
    def fingerprint(self) -> str:
        return files_fingerprint(self.files)

    def refuse_changed(self) -> None:
        refuse_changed({path: self._before.get(path) for path in [*self._named(), *self._shards]})

    def _named(self) -> list[Path]:
        """The files that are read besides the weights, whether they are there or not."""
        wanted = [*VERBATIM, TOKENIZER, ADDED, CHAT_TEMPLATE, FURTHER_TEMPLATE, PROCESSOR_TEMPLATE, INDEX]
        return [self.folder / name for name in wanted]

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
        stored = {shard: tensors_of(shard, self._reader) for shard in self._shards}
        own_names = self._description.own_names([name for tensors in stored.values() for name in tensors])
        for shard, tensors in stored.items():
            for stored_name, tensor in tensors.items():
                name = own_names[stored_name]
                if name is None:
                    others.append(stored_name)
                elif name in found:
                    raise SourceError(f"{self.label}: tensor {name} occurs in {shard.name} and in a shard before it")
                else:
                    found[name] = tensor
        return found, others

    def _place(self, tied: bool) -> dict[str, Origin]:
        """The origin of each tensor of the program."""
        shapes = {name: each.spec.shape for name, each in self._weights.items()}
        program, layout = self.model.program, self._description.layout
        if self._unreadable:
            needed = (part for name, *_ in program.weights() for origin in layout(name) for part in origin.names)
            with naming(Path(self.label)):
                refuse_unreadable(needed, self._unreadable)
        origins = place(program, layout, shapes, tied, self.label)
        if unread := [*surplus(origins, shapes, self.label), *self._unreadable]:
            self._notes.append(f"tensors that the configuration does not describe are left out: {some(unread)}")
        return origins

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

    def _model(self, tokenizer: FolderTokenizer) -> ModelMetadata:
        """The program, and the metadata from the other files."""
        keys, own, special = self._description.keys, self._description.config, tokenizer.special_tokens
        generation = generation_of(self.folder)
        self._notes += generation.notes
        # The default of a family's class may lie past a small vocabulary; it then belongs to another model.
        eos = generation.ends if generation.ends is not None else keys.eos_token_id
        if generation.ends is None and "eos_token_id" not in own:
            eos = tuple(index for index in eos if index < keys.vocab_size)
        by_name = {name: token.id for name, token in special.items() if token.id is not None}
        named = [*eos, *(by_name[name] for name in ("eos_token",) if name in by_name)]
        first = tokenizer.first_id
        return ModelMetadata(
            program=self._description.program,
            context_length=keys.max_position_embeddings,
            bos_id=self._begin(by_name.get("bos_token")) if first is None else first,
            eos_ids=ends(self._within(named), tokenizer.id_of),
            add_bos=first is not None,
            special_tokens=special,
            generation=generation.options,
            family=self._description.family.name,
        )

    def _begin(self, named: int | None) -> int | None:
        """The token that begins a text: the one that the tokenizer names, or that of config.json."""
        keys = self._description.keys
        if named is not None or keys.bos_token_id is None:
            return named
        default = "bos_token_id" not in self._description.config and keys.bos_token_id >= keys.vocab_size
        return None if default else next(iter(self._within([keys.bos_token_id])), None)

    def _within(self, ids: Iterable[int]) -> list[int]:
        """The ids that have a row in the embedding; -1 stands for none in some checkpoints."""
        rows = self._description.keys.vocab_size
        past = [index for index in ids if index >= rows]
        if past:
            self._notes.append(f"token ids past the {rows} rows of the embedding are ignored: {some(past)}")
        return [index for index in ids if 0 <= index < rows]

    def _find_shards(self) -> list[Path]:
        found = shards(self.folder)
        if (self.folder / INDEX).is_file() and self.folder / SINGLE in found:
            self._notes.append(f"{INDEX} is ignored beside {SINGLE}")
        return found

    def _look_for_adapter(self) -> None:
        """Refuse a folder that holds an adapter alone; say that one beside a model is left out."""
        path = self.folder / ADAPTER
        if not path.is_file():
            return
        base = read_json(path).get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base else ""
        if not (self.folder / CONFIG).is_file():
            raise SourceError(
                f"{self.label}: an adapter{of} without its model; merge them with peft's merge_and_unload and save the "
                "result"
            )
        self._notes.append(f"{ADAPTER}: the adapter{of} beside the model is left out")


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
        return f"{shown_name(folder.parent.parent).removeprefix('models--').replace('--', '/')}@{folder.name[:12]}"
    return shown_name(folder)
