"""One mapped file with the sections that lie in it: a whole file, or one part of a model in several files.

Knows where bytes are, not what they mean. A missing, cut or swapped part is refused by its name.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rkf.errors import StructureError, UsageError, naming
from rkf.file.identity import identity, refuse_changed
from rkf.file.mapped import mapped
from rkf.file.structure import Structure
from rkf.format import integrity
from rkf.format.constants import KIND_PART, SUPERBLOCK_BYTES
from rkf.format.extents import Section
from rkf.format.fields import REMEDY, refuse
from rkf.format.part_directory import PartEntry, index_name, parse_part, part_name
from rkf.format.superblock import Superblock, parse_superblock


class Body:
    """A file whose superblock is valid and whose length is the stated one. Views of it stay valid after `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = identity(path)
        self._map, self.superblock = _map(path)
        self._view: memoryview | None = memoryview(self._map)

    @property
    def directory(self) -> bytes:
        return self._map[self.superblock.directory_offset :]

    def stored(self, section: Section) -> memoryview:
        """The stored bytes of a section."""
        if self._view is None:
            raise UsageError(f"{self.path}: the container is closed: open it again")
        return self._view[section.offset : section.offset + section.length]

    def check_integrity(self, sections: Sequence[Section]) -> None:
        """Check the hashes of all its sections, and the padding. Raises IntegrityError."""
        for number, section in enumerate(sections):
            integrity.check_hash(self.stored(section), section.stored_hash, section.label(number))
        extents = [(0, SUPERBLOCK_BYTES), *((s.offset, s.offset + s.length) for s in sections)]
        integrity.check_padding(memoryview(self._map), extents, self.superblock.directory_offset, "file")

    def refuse_changed(self) -> None:
        """Raise ChangedError if the file is not as it was at open.

        A file that was renamed over this one is no change: the map still shows the old one.
        """
        found, before = identity(self.path), self._identity
        if found is not None and before is not None and found[:2] == before[:2]:
            refuse_changed({self.path: before})

    def close(self) -> None:
        self._view = None
        with suppress(BufferError):  # views that are still in use keep the map alive
            self._map.close()


@dataclass(frozen=True, slots=True)
class PartReport:
    """A part that was verified alone. number: from 1; index: the name of the file that is opened as the model."""

    number: int
    sections: int
    file_bytes: int
    index: str | None


def is_part(path: Path) -> bool:
    """Whether a file is one part of a model. Raises what opening it would."""
    with naming(path):
        body = Body(path)
        body.close()
        return body.superblock.kind == KIND_PART


def verify_part(path: Path) -> PartReport:
    """Check one part alone: its structure and every byte. Raises NotRkfError, UnsupportedError, StructureError,
    IntegrityError, and UsageError for a file that is no part.
    """
    with naming(path):
        body = Body(path)
        try:
            if body.superblock.kind != KIND_PART:
                raise UsageError("expected a part of a model, got a whole file")
            number, sections = parse_part(body.directory, body.superblock)
            body.check_integrity(sections)
        finally:
            body.close()
    return PartReport(number, len(sections), body.superblock.file_bytes, index_name(path.name))


def part_count(path: Path) -> int:
    """How many parts a model has, by its index alone; 0 of a whole file."""
    with naming(path):
        body = Body(path)
        try:
            return len(Structure(path, body.superblock, body.directory).directory.parts)
        finally:
            body.close()


def part_paths(index: Path, count: int) -> list[Path]:
    """The files of the parts: beside the index, also where its name is a link to the file beside which they are."""
    beside = [index.with_name(part_name(index.name, number, count)) for number in range(1, count + 1)]
    if count and index.is_symlink() and not beside[0].exists():
        return part_paths(index.resolve(), count)
    return beside


def open_parts(index: Path, entries: Sequence[PartEntry]) -> list[Body]:
    """The parts of an index, each checked to be the one that it describes. Raises StructureError, naming the part."""
    bodies = []
    for number, (path, entry) in enumerate(zip(part_paths(index, len(entries)), entries, strict=True), 1):
        with naming(path):
            if not path.exists():
                refuse(f"part {number} of {len(entries)}", "its file beside the index", "no such file")
            body = Body(path)
            bodies.append(body)
            _check_part(body, number, entry)
    return bodies


def _check_part(body: Body, number: int, entry: PartEntry) -> None:
    superblock = body.superblock
    if superblock.kind != KIND_PART:
        refuse("superblock, kind", f"{KIND_PART} (part)", superblock.kind)
    found, sections = parse_part(body.directory, superblock)
    if found != number:
        refuse("directory, number", f"part {number}", f"part {found}")
    if (superblock.directory_hash, superblock.file_bytes, sections) != (
        entry.directory_hash,
        entry.length,
        entry.sections,
    ):
        refuse(f"part {number}", "the one that the index describes", "that of another model")


def _map(path: Path) -> tuple[mmap.mmap, Superblock]:
    """Map a file whose superblock is valid and whose length is the stated one."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError("expected a regular file, got a folder, pipe or device")
        with path.open("rb", buffering=0) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            superblock = parse_superblock(file.read(SUPERBLOCK_BYTES))
            if file_bytes != superblock.file_bytes:
                problem = "truncated" if file_bytes < superblock.file_bytes else "bytes after the end"
                raise StructureError(f"expected {superblock.file_bytes} bytes, got {file_bytes} ({problem}); {REMEDY}")
            return mapped(file.fileno(), path, file_bytes), superblock
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
