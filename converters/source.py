"""The interface of a checkpoint in any format to the pipeline. Knows no format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from rkf.converters.families.layout import Origin
from rkf.converters.input_files import shown_name
from rkf.converters.pull import FROM_HUB
from rkf.errors import SourceError, UsageError
from rkf.file.atomic import refuse_same_file
from rkf.format.constants import DTYPE_BYTES
from rkf.format.matrix import DenseTensor
from rkf.model.metadata import ModelMetadata


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The description of a tensor before it is read.

    shape: output-major. dtype: the narrowest dense dtype that holds every value exactly ("bf16", "f16", "f32").
    stored_type: its type in the checkpoint ("BF16", "Q4_1", …). stored_bytes: its size there.
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
        """Bytes if it is stored dense."""
        return self.weights * DTYPE_BYTES[self.dtype]


class Source(Protocol):
    """A checkpoint with names, shapes and conventions already converted to rkf's (docs/architecture.md).

    aliases: second names of tensors. verbatim: files of the checkpoint that are copied unchanged, by name.
    left_out: parts of the checkpoint that are not converted, such as a vision tower. notes: lines about what the
    checkpoint says in two ways, and which of them was taken.
    """

    @property
    def label(self) -> str: ...
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
    def left_out(self) -> tuple[str, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def verbatim(self) -> Mapping[str, bytes]: ...

    @property
    def files(self) -> Mapping[str, str]:
        """File name -> BLAKE3 (hex) of every file that is read."""
        ...

    @property
    def fingerprint(self) -> str:
        """BLAKE3 (hex) over `files`: two sources with the same one convert to the same bytes."""
        ...

    def refuse_changed(self) -> None:
        """Raise ChangedError if a file of the checkpoint is not as it was before the first of them was read: what was
        read may then be a mixture, and `files` the hashes of something else.
        """
        ...

    def read(self, name: str) -> DenseTensor:
        """One tensor, output-major, q/k rows in Hugging Face rope order. May be called from several threads."""
        ...


class ChangedSource:
    """A source made from another one: what a subclass does not replace is the other's. See `Source`."""

    def __init__(self, source: Source) -> None:
        self._source = source

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
    def notes(self) -> tuple[str, ...]:
        return self._source.notes

    @property
    def verbatim(self) -> Mapping[str, bytes]:
        return self._source.verbatim


def spec_of(origin: Origin, stored: Mapping[str, TensorSpec]) -> TensorSpec:
    """The description of a tensor of the program, from those of the tensors that it is made of."""
    parts = [stored[name] for name in origin.names]
    shape = origin.shape(parts[0].shape)
    share = prod(shape) / sum(part.weights for part in parts)
    return TensorSpec(
        shape, _dtype(origin, parts), parts[0].stored_type, round(share * sum(part.stored_bytes for part in parts))
    )


def read_origin(
    origin: Origin, stored: Mapping[str, TensorSpec], read: Callable[[str, int, int], DenseTensor]
) -> DenseTensor:
    """A tensor of the program. read: returns entries start … stop - 1 of a checkpoint's tensor along its first axis."""
    dtype = _dtype(origin, [stored[name] for name in origin.names])
    parts = []
    for name in origin.names:
        first, *rest = origin.part or (slice(0, stored[name].shape[0]),)
        if origin.heads > 1:
            tensor = read(name, 0, stored[name].shape[0])
            part = origin.cut(tensor.data if tensor.dtype == dtype else tensor.decode())
        else:  # only the rows of the part
            tensor = read(name, first.start, first.stop)
            part = (tensor.data if tensor.dtype == dtype else tensor.decode())[(slice(None), *rest)]
        for step in origin.steps:
            part = step.apply(part)
        parts.append(part)
    values = np.stack(parts) if origin.stacked else np.concatenate(parts) if origin.joined else parts[0]
    return DenseTensor(dtype, np.ascontiguousarray(values))


def _dtype(origin: Origin, parts: list[TensorSpec]) -> str:
    """The common dtype of the parts if values are only moved; otherwise f32."""
    return parts[0].dtype if origin.keeps_values and len({part.dtype for part in parts}) == 1 else "f32"


def stored_head(source: Source) -> str:
    """The name under which a source stores its output head: the embedding's, if the head is tied."""
    head = source.model.program.logits.weight
    return source.aliases.get(head, head)


def refuse_source(out: Path, path: Path, source: Source) -> None:
    """Raise OutputError if `out` is one of the files of the checkpoint at `path`."""
    for name in source.files:
        refuse_same_file(out, path / name if path.is_dir() else path)


def open_source(path: str | Path) -> Source:
    """The checkpoint at `path`: a folder in Hugging Face's layout, a GGUF file, or hub:USER/REPO.

    Raises UsageError if there is nothing, SourceError if it cannot be converted.
    """
    path = Path(path)
    if str(path).startswith(FROM_HUB) and not path.exists():
        from rkf.converters.hub_checkpoint import HubSource

        return HubSource(str(path))
    if path.is_dir():
        from rkf.converters.hf import HfSource

        files = [] if (path / "config.json").is_file() else sorted(path.glob("*.gguf"))
        if files:
            raise SourceError(f"{path}: not a Hugging Face folder; give one of its GGUF files: {shown_name(files[0])}")
        return HfSource(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; expected a Hugging Face folder or a .gguf file")
    if not path.is_file():
        raise UsageError(f"{path}: not a regular file; expected a Hugging Face folder or a .gguf file")
    if path.suffix == ".safetensors":
        raise SourceError(f"{path}: a bare safetensors file; give the folder that also holds config.json")
    from rkf.converters.gguf import GgufSource

    try:
        return GgufSource(path)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
