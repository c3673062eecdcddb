"""Models in several files (spec/parts.md): what an index says of its parts, and the directory of a part. Pure.

A part holds a run of the sections of one file, at the distances that they have there. So a section's place in its part
follows from its place in the whole file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from blake3 import blake3

from rkf.errors import StructureError
from rkf.format import canonical
from rkf.format.constants import MAX_CONTAINERS, MAX_DIRECTORY_BYTES, MAX_PARTS, SUPERBLOCK_BYTES, aligned
from rkf.format.extents import Section, parse_sections
from rkf.format.fields import REMEDY, Fields, refuse
from rkf.format.superblock import Superblock

_ENDING = ".rkf"
_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.rkf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class PartEntry:
    """One part, as the index has it. sections: those of the model that it holds, at their places in the part; length:
    of its file; directory_hash: that of its superblock.
    """

    sections: tuple[Section, ...]
    length: int
    directory_hash: bytes

    @property
    def directory_length(self) -> int:
        last = self.sections[-1]
        return self.length - aligned(last.offset + last.length)


def part_name(index: str, number: int, count: int) -> str:
    """The name of a part's file, from that of the index: "model.rkf" -> "model-00002-of-00003.rkf". number: from 1."""
    return f"{index.removesuffix(_ENDING)}-{number:05}-of-{count:05}{_ENDING}"


def index_name(part: str) -> str | None:
    """The name of the index of a part, by its file's name; None for a name that no part has."""
    found = _NAME.fullmatch(part)
    return None if found is None else f"{found['stem']}{_ENDING}"


def decoded(data: bytes, superblock: Superblock) -> Any:
    """The map in a directory's bytes, after the checks of their length, hash and encoding."""
    if len(data) != superblock.directory_length:
        refuse("directory", f"{superblock.directory_length} bytes", len(data))
    if blake3(data).digest() != superblock.directory_hash:
        refuse("directory", "the hash in the superblock", "another one")
    try:
        return canonical.decode(data)
    except StructureError as error:
        raise StructureError(f"directory: {error}; {REMEDY}") from None


def parse_parts(items: list[Any], sections: Sequence[Section]) -> tuple[PartEntry, ...]:
    """The parts of an index; StructureError unless they hold all its sections, each once and in order."""
    parts: list[PartEntry] = []
    first = 0
    if not items:
        refuse("directory, parts", f"1 to {MAX_PARTS} parts", "none")
    for number, item in enumerate(items, 1):
        fields = Fields(item, f"part {number}", ("directory_hash", "length", "sections"))
        count = fields.integer("sections", 1)
        if first + count > len(sections):
            refuse(fields.at("sections"), f"at most {len(sections) - first}, which are left", count)
        held = _moved(sections[first : first + count])
        entry = PartEntry(held, fields.integer("length"), fields.digest("directory_hash"))
        if not 1 <= entry.directory_length <= MAX_DIRECTORY_BYTES:
            refuse(fields.at("length"), "room for its sections and a directory", entry.length)
        parts.append(entry)
        first += count
    if first != len(sections):
        refuse("directory, parts", f"{len(sections)} sections in all", first)
    return tuple(parts)


def parse_part(data: bytes, superblock: Superblock) -> tuple[int, tuple[Section, ...]]:
    """The number of a part, and its sections, from the bytes of its directory."""
    fields = Fields(decoded(data, superblock), "directory", ("number", "sections"))
    number = fields.integer("number", 1, MAX_PARTS)
    sections = parse_sections(fields.list("sections", MAX_CONTAINERS), superblock)
    if not sections:
        refuse("directory, sections", "at least one", "none")
    return number, sections


def _moved(sections: Sequence[Section]) -> tuple[Section, ...]:
    """A run of sections of the whole file, at their places in a part."""
    distance = sections[0].offset - SUPERBLOCK_BYTES
    return tuple(replace(section, offset=section.offset - distance) for section in sections)
