"""A config.json as read by its family: keys, program, layout of tensors. Knows no file format and no family."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkf.converters.families import family_of
from rkf.converters.families.blocks import HEAD
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family
from rkf.converters.families.keys import read
from rkf.converters.families.layout import Layout, by_full_name
from rkf.converters.gguf_names import gguf_layout
from rkf.errors import CorruptError, SourceError, naming
from rkf.format.fields import REMEDY
from rkf.model.metadata import ModelMetadata
from rkf.model.program import Program


@dataclass(frozen=True, slots=True)
class Description:
    """The contents of a config.json. config: the decoder's own; if wrapped, it is inside another model's."""

    family: Family[Any]
    config: Mapping[str, Any]
    keys: DecoderKeys
    program: Program
    wrapped: bool

    @property
    def layout(self) -> Layout:
        """Where tensors are in a Hugging Face checkpoint."""
        return by_full_name(self.family.layout(self.keys), self.family.prefix)

    @property
    def gguf_layout(self) -> Layout:
        """Where tensors are in a GGUF."""
        layout = by_full_name(self.family.gguf.layout(self.keys), self.family.prefix)
        return gguf_layout(self.family.gguf.architecture, layout, self.family.gguf.numbers)

    def own_names(self, names: Collection[str]) -> dict[str, str | None]:
        """A checkpoint's tensors -> their names in the decoder alone; None for one that is not the decoder's weight.

        A decoder that was saved without its head has names without the prefix, and one that was saved as a part of
        another module may have it twice; the reference reads both.
        """
        if self.wrapped:
            return {name: self.family.own_name(self.keys, name, True) for name in names}
        heads = {head for origin in self.layout(HEAD) for head in origin.names}
        prefix = self.family.prefix
        usual = {name: _once(name, prefix, heads) for name in names}
        own = {name: self.family.own_name(self.keys, each, False) for name, each in usual.items()}
        if any(name.startswith(prefix) for name in own.values() if name is not None):
            return own
        return {
            name: self.family.own_name(self.keys, prefix + name, False) if each == name and name not in heads else each
            for name, each in own.items()
        }

    def left_out(self, names: Collection[str]) -> tuple[str, ...]:
        """The parts of the model around the decoder that these tensors belong to."""
        parts = self.family.wrapper.dropped if self.wrapped and self.family.wrapper else ()
        return tuple(part.rstrip(".") for part in parts if any(name.startswith(part) for name in names))


def _once(name: str, prefix: str, heads: Container[str]) -> str:
    """A tensor's name without the second of two prefixes, or without the one of a head."""
    rest = name.removeprefix(prefix)
    return rest if rest.startswith(prefix) or rest in heads else name


def describe(config: Mapping[str, Any], label: str, tied: bool | None = None) -> Description:
    """Read a config.json. label: the checkpoint's name in messages. tied: replaces the decoder's tie_word_embeddings.

    Raises UnsupportedError for what rkf cannot express, SourceError for invalid values.
    """
    with naming(Path(label)):
        family, own, wrapped = family_of(config)
        if tied is not None:
            own["tie_word_embeddings"] = tied
        keys = read(family.keys, own)
        program: Program = family.program(keys)
        try:
            program.check()
        except CorruptError as error:
            raise _unusable(error) from None
        return Description(family, own, keys, program, wrapped)


def checked(model: ModelMetadata, label: str) -> ModelMetadata:
    """The metadata; SourceError if a reader of the file would refuse it."""
    with naming(Path(label)):
        try:
            return ModelMetadata.from_metadata(model.to_metadata())
        except CorruptError as error:
            raise _unusable(error) from None


def _unusable(error: CorruptError) -> SourceError:
    problem = str(error).removeprefix("metadata.model, ").removesuffix(f"; {REMEDY}")
    return SourceError(f"its configuration cannot be used: {problem}")
