"""Writes a model in several files: `SectionWriter` whose sections go to part after part (spec/parts.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rkf.errors import CorruptError, NotRkfError, UsageError
from rkf.file.atomic import Companions, OutputFile, companions
from rkf.file.sections import SectionWriter, align, sealed
from rkf.format.constants import FEATURE_PARTS, KIND_MODEL, KIND_PART, MAX_PARTS, MINOR, SUPERBLOCK_BYTES, aligned
from rkf.format.part_directory import parse_part, part_name
from rkf.format.superblock import parse_superblock


def check_part_bytes(part_bytes: int) -> None:
    """Raise UsageError for a size that no part can have."""
    if part_bytes <= SUPERBLOCK_BYTES:
        raise UsageError(f"size of parts: expected more than {SUPERBLOCK_BYTES} bytes, got {part_bytes}")


@contextmanager
def part_writer(out: OutputFile, path: Path, part_bytes: int, force: bool) -> Iterator[PartWriter]:
    """A writer of parts beside `path`, whose index goes to `out`. The parts take their names when the `with` ends.

    Raises UsageError for a link: the parts would lie beside it, and their index elsewhere.
    """
    if path.is_symlink():
        raise UsageError(f"{path}: a link cannot be the index of a model in parts: choose another name")
    with companions(path, force, _is_part) as files:
        yield PartWriter(out, path, files, part_bytes)


def _is_part(path: Path) -> bool:
    """Whether a file begins as a part of a model."""
    with suppress(OSError, CorruptError, NotRkfError), path.open("rb") as file:
        return parse_superblock(file.read(SUPERBLOCK_BYTES)).kind == KIND_PART
    return False


class PartWriter(SectionWriter):
    """part_bytes: most bytes of a part before its directory; only a longer section has a part with more, alone."""

    def __init__(self, out: OutputFile, path: Path, files: Companions, part_bytes: int) -> None:
        super().__init__(out)
        self._path, self._files, self._part_bytes = path, files, part_bytes
        self._required = FEATURE_PARTS
        self._parts: list[dict[str, Any]] = []
        self._first = 0  # section of the part that is being written
        self._distance = 0  # from places in the part to those in the whole file
        self._end = SUPERBLOCK_BYTES  # of the last section, in the whole file

    def finish(self, directory: Mapping[str, Any], kind: int, minor: int = MINOR, optional: int = 0) -> None:
        """Write the last part and the index; see SectionWriter.finish. Raises UsageError for what has no parts."""
        if kind != KIND_MODEL or not self.sections:
            raise UsageError("only a model that has tensors can be in parts")
        self._seal()
        self._files.names = [
            part_name(self._path.name, number, len(self._parts)) for number in range(1, len(self._parts) + 1)
        ]
        super().finish({**directory, "parts": self._parts}, kind, minor, optional)

    def _begin(self, length: int) -> int:
        end = aligned(self._end)
        is_full = aligned(self._body.position) + length > self._part_bytes
        if not self.sections or (is_full and self._first < len(self.sections)):
            self._next(end)
        align(self._body)
        self._end = end + length
        return end

    def _next(self, offset: int) -> None:
        """Begin a part whose first section has this offset in the whole file."""
        if self.sections:
            self._seal()
        if len(self._parts) == MAX_PARTS:
            raise UsageError(f"more than {MAX_PARTS} parts: choose a greater size of parts")
        self._body = self._files.open()
        self._body.write(bytes(SUPERBLOCK_BYTES))
        self._first, self._distance = len(self.sections), offset - SUPERBLOCK_BYTES

    def _seal(self) -> None:
        """Write the directory and the superblock of the part."""
        align(self._body)
        held = self.sections[self._first :]
        sections = [{**section, "offset": section["offset"] - self._distance} for section in held]
        content = {"number": len(self._parts) + 1, "sections": sections}
        data, superblock = sealed(self._body, content, KIND_PART, FEATURE_PARTS)
        parse_part(data, superblock)
        self._body.write(data)
        self._body.overwrite_start(superblock.encode())
        entry = {"directory_hash": superblock.directory_hash, "length": superblock.file_bytes, "sections": len(held)}
        self._parts.append(entry)
