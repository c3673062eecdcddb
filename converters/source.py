"""What a foreign checkpoint looks like to the pipeline, whatever its format. Knows no format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

from rkf.errors import SourceError, UsageError
from rkf.file.atomic import refuse_same_file
from rkf.format.constants import DTYPE_BYTES
from rkf.format.matrix import DenseTensor
from rkf.model.first_form import ModelConfig
from rkf.model.metadata import ModelMetadata


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before it is read.

    shape: output-major. dtype: the narrowest dense dtype that holds every value exactly ("bf16", "f16", "f32").
    stored_type: what the checkpoint calls it ("BF16", "Q4_1", …). stored_bytes: its size there.
    """

    shape: tuple[int, ...]
    dtype: str
    stored_type: str
    stored_bytes: int

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """Bytes when it is stored dense."""
        return self.weights * DTYPE_BYTES[self.dtype]


class Source(Protocol):
    """A checkpoint whose names, shapes and quirks are already those of rkf (docs/architecture.md)."""

    @property
    def label(self) -> str: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def model(self) -> ModelMetadata: ...
    @property
    def tensors(self) -> Mapping[str, TensorSpec]: ...
    @property
    def aliases(self) -> Mapping[str, str]: ...
    @property
    def tokenizer_json(self) -> bytes: ...
    @property
    def chat_template(self) -> str | None: ...

    @property
    def files(self) -> Mapping[str, str]:
        """File name -> BLAKE3 (hex) of every file that is read."""
        ...

    @property
    def fingerprint(self) -> str:
        """BLAKE3 (hex) over `files`: two sources with the same one convert to the same bytes."""
        ...

    def read(self, name: str) -> DenseTensor:
        """One tensor, output-major, q/k rows in Hugging Face rope order. May be called from several threads."""
        ...


def refuse_source(out: Path, path: Path, source: Source) -> None:
    """Raise OutputError if `out` is a file that the checkpoint at `path` is read from."""
    for name in source.files:
        refuse_same_file(out, path / name if path.is_dir() else path)


def open_source(path: str | Path) -> Source:
    """The checkpoint at `path`: a folder in Hugging Face's layout, or a GGUF file.

    Raises UsageError when there is nothing, SourceError when it can't be converted.
    """
    path = Path(path)
    if path.is_dir():
        from rkf.converters.hf import HfSource

        return HfSource(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; expected a Hugging Face folder or a .gguf file")
    if not path.is_file():
        raise UsageError(f"{path}: not a regular file; expected a Hugging Face folder or a .gguf file")
    if path.suffix == ".safetensors":
        raise SourceError(f"{path}: a bare safetensors file; give the folder that also holds config.json")
    from rkf.converters.gguf import GgufSource

    return GgufSource(path)
