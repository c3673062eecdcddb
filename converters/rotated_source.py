"""A source whose program reads its matrices through Hadamard transforms, with the weights to match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rkf.converters.source import Source, TensorSpec
from rkf.format.matrix import DenseTensor, from_f32
from rkf.model.hadamard_blocks import transformed
from rkf.model.metadata import ModelMetadata
from rkf.model.rotation import rotated, rotations


class RotatedSource:
    """The same model as `source`, in the form that is clustered with less error (`rkf.model.rotation`)."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.model: ModelMetadata = replace(source.model, program=rotated(source.model.program, source.aliases))
        blocks = rotations(self.model.program)
        self._blocks = {source.aliases.get(name, name): block for name, block in blocks.items()}

    @property
    def label(self) -> str:
        return self._source.label

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self._source.tensors

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._source.aliases

    @property
    def tokenizer_json(self) -> bytes:
        return self._source.tokenizer_json

    @property
    def chat_template(self) -> str | None:
        return self._source.chat_template

    @property
    def left_out(self) -> tuple[str, ...]:
        return self._source.left_out

    @property
    def verbatim(self) -> Mapping[str, bytes]:
        return self._source.verbatim

    @property
    def files(self) -> Mapping[str, str]:
        return self._source.files

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    def read(self, name: str) -> DenseTensor:
        """A tensor of the source; the rows of matrices are transformed and rounded to the source's dtype."""
        tensor = self._source.read(name)
        block = self._blocks.get(name)
        if block is None:
            return tensor
        return DenseTensor(tensor.dtype, from_f32(transformed(tensor.decode(), block), tensor.dtype))
