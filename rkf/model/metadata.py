"""A file's description of its model: `metadata.model` (spec/program.md, section 2), in either form, as one object.

Files of version 1.0 have numbers from which a program follows (first_form.py); newer files carry the program.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from rkf.format.fields import Fields, integer, refuse
from rkf.model.first_form import ModelConfig
from rkf.model.program import Program
from rkf.model.rotation import unrotated

MAX_EOS = 256
MAX_SPECIAL = 4096
_SIZE_MAX = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token with a special meaning, as in the tokenizer. id: None if the vocabulary does not have its text."""

    text: str
    id: int | None = None


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """A model's program, and the data around it: token ids, lengths, recommendations.

    context_length: positions that the model was made for. eos_ids: tokens that end an answer. special_tokens: by the
    names that chat templates use ("bos_token", "eos_token", …). generation: the authors' recommended sampling options.
    family: the model_type of its checkpoint, for people and exporters; no computation depends on it.
    """

    program: Program
    context_length: int
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    special_tokens: Mapping[str, SpecialToken] = field(default_factory=dict)
    generation: Mapping[str, float] = field(default_factory=dict)
    family: str | None = None

    @property
    def vocab_size(self) -> int:
        """Rows of the logits: token ids are below it."""
        return self.program.vocab_size

    @property
    def layers(self) -> int:
        return self.program.layers

    def computes_as(self, other: ModelMetadata) -> bool:
        """Whether both are the same model, apart from rotation, names of special tokens and recommendations."""
        same = unrotated(self.program) == unrotated(other.program)
        return same and self.context_length == other.context_length

    def to_metadata(self) -> dict[str, Any]:
        """The map `metadata.model` of a file that carries its program."""
        found: dict[str, Any] = {
            "add_bos": self.add_bos,
            "context_length": self.context_length,
            "eos_ids": list(self.eos_ids),
            "generation": dict(self.generation),
            "program": self.program.to_metadata(),
            "special_tokens": {
                name: {"text": token.text} | ({} if token.id is None else {"id": token.id})
                for name, token in self.special_tokens.items()
            },
        }
        if self.bos_id is not None:
            found["bos_id"] = self.bos_id
        if self.family is not None:
            found["family"] = self.family
        return found

    @classmethod
    def from_metadata(cls, metadata: Any) -> ModelMetadata:
        """The inverse of `to_metadata`, with every key checked.

        Raises StructureError that names the key, UnsupportedError for an unknown op or word.
        """
        where = "metadata.model"
        if isinstance(metadata, dict) and "program" in metadata:  # first, so that a newer file does not look damaged
            program = Program.from_metadata(metadata["program"])
        required = ("add_bos", "context_length", "eos_ids", "generation", "program", "special_tokens")
        fields = Fields(metadata, where, required, ("bos_id", "family"))
        model = cls(
            program=program,
            context_length=fields.integer("context_length", 1, _SIZE_MAX),
            bos_id=fields.integer("bos_id") if "bos_id" in fields else None,
            eos_ids=tuple(integer(each, fields.at("eos_ids")) for each in fields.list("eos_ids", MAX_EOS)),
            add_bos=fields.flag("add_bos"),
            special_tokens=_special_tokens(fields),
            generation=fields.numbers("generation"),
            family=fields.text("family") if "family" in fields else None,
        )
        model._check()
        return model

    @classmethod
    def of_first_form(cls, metadata: Any, tensors: Container[str]) -> ModelMetadata:
        """The metadata of a 1.0 file. tensors: those of the file, which show the biases and norms of its model."""
        config = ModelConfig.from_metadata(metadata)
        return cls(
            program=config.program(tensors),
            context_length=config.context_length,
            bos_id=config.bos_id,
            eos_ids=config.eos_ids,
            add_bos=config.add_bos,
            generation=config.generation,
            family=config.architecture,
        )

    def _check(self) -> None:
        """Check the relations between keys."""
        ids = [("bos_id", self.bos_id), *(("eos_ids", each) for each in self.eos_ids)]
        ids += [(f"special_tokens, {name}", token.id) for name, token in self.special_tokens.items()]
        for key, token_id in ids:
            if token_id is not None and token_id >= self.vocab_size:
                refuse(f"metadata.model, {key}", f"token ids below {self.vocab_size}, the rows of the logits", token_id)
        if self.add_bos and self.bos_id is None:
            refuse("metadata.model, bos_id", "a token id, as add_bos is true", "none")


def _special_tokens(fields: Fields) -> dict[str, SpecialToken]:
    found = {}
    tokens = fields.map("special_tokens")
    if len(tokens) > MAX_SPECIAL:
        refuse(fields.at("special_tokens"), f"at most {MAX_SPECIAL} of them", len(tokens))
    for name in tokens:
        if name.startswith("x-"):
            continue
        token = Fields(tokens[name], fields.at(f"special_tokens, {name!r}"), ("text",), ("id",))
        text = token.raw("text")
        if not isinstance(text, str):
            refuse(token.at("text"), "a string", type(text).__name__)
        found[name] = SpecialToken(text, token.integer("id") if "id" in token else None)
    return found
