"""What a file's superblock and directory say, without its data: two reads are enough, also of a file elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rkf.format.directory import Directory, parse_directory
from rkf.format.extents import Section
from rkf.format.superblock import Superblock
from rkf.format.tensors import TensorEntry
from rkf.model.expected import read_model
from rkf.model.metadata import ModelMetadata


class Structure:
    """A checked structure. path: of the file, or its name for messages.

    metadata, provenance: the maps of the file; model: metadata["model"] as a ModelMetadata, or None if there is none;
    tensors, sections: their entries in the directory; file_bytes: of the file and its parts; order: "ascending", or
    "none" for unordered values.
    """

    def __init__(self, path: Path, superblock: Superblock, directory: bytes) -> None:
        """directory: the file's bytes from superblock.directory_offset to its end. Raises StructureError,
        UnsupportedError.
        """
        self.path, self.superblock = path, superblock
        self.directory: Directory = parse_directory(directory, superblock)
        self.kind: int = superblock.kind
        self.file_bytes: int = superblock.file_bytes + sum(part.length for part in self.directory.parts)
        self.metadata: Mapping[str, Any] = self.directory.metadata
        self.provenance: Mapping[str, Any] = self.directory.provenance
        self.model: ModelMetadata | None = read_model(self.directory, superblock)
        self.tensors: Mapping[str, TensorEntry] = MappingProxyType(dict(self.directory.tensors))
        self.sections: tuple[Section, ...] = self.directory.sections
        self.ranks_id: bytes = self.directory.ranks_id
        self.dense_id: bytes = self.directory.dense_id
        self.order: str = self.directory.order
