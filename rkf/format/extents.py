"""Sections: their places in the file, and their assignment to tensors. Knows no tensor.

The order of sections is fixed, so the next tensor in turn must claim each. Nothing can overlap, be shared or be left
over. Sizes are exact Python integers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rkf.format.constants import (
    ALIGNMENT,
    CODEC_RAW,
    CODEC_ZSTD,
    KIND_MODEL,
    MAX_BLOB_BYTES,
    MAX_VALUES,
    MAX_ZSTD_EXPANSION,
    SUPERBLOCK_BYTES,
    ZSTD_CHUNK_BYTES,
    aligned,
)
from rkf.format.fields import U64_MAX, Fields, integer, refuse
from rkf.format.superblock import Superblock

SECTION_KINDS = ("plane", "counts", "positions", "dense", "values", "blob")


@dataclass(frozen=True, slots=True)
class Section:
    """An extent of the file. length: stored bytes; decoded_length and hash: those of the decoded bytes."""

    kind: str
    offset: int
    length: int
    hash: bytes
    codec: str
    decoded_length: int
    stored_hash: bytes
    chunks: tuple[int, ...] = ()
    name: str | None = None

    def label(self, number: int) -> str:
        """Its name in messages."""
        return f"section {number} ({self.name or self.kind})"


def extent(offset: int, length: int, previous_end: int, limit: int, where: str) -> int:
    """The end of a section. This is the only place where extents are computed.

    A section begins at the first multiple of ALIGNMENT after the one before it, and ends by `limit`.
    """
    if offset < previous_end:
        refuse(f"{where}, offset", f"{aligned(previous_end)}", f"{offset}, which overlaps what ends at {previous_end}")
    if offset != aligned(previous_end):
        kind = "a hole" if offset % ALIGNMENT == 0 else "misaligned"
        refuse(f"{where}, offset", f"{aligned(previous_end)}", f"{offset} ({kind})")
    if length < 1 or offset + length > limit:
        refuse(f"{where}, length", f"1 to {limit - offset} bytes", length)
    return offset + length


def parse_sections(items: list[Any], superblock: Superblock) -> tuple[Section, ...]:
    """The sections of a directory, which follow each other from the superblock to the directory. Those of an index have
    the offsets that they would have in one file.
    """
    elsewhere = superblock.kind == KIND_MODEL and superblock.in_parts
    limit = U64_MAX if elsewhere else superblock.directory_offset
    sections, end = [], SUPERBLOCK_BYTES
    for number, item in enumerate(items):
        section = _section(item, f"section {number}")
        end = extent(section.offset, section.length, end, limit, f"section {number}")
        sections.append(section)
    if elsewhere:
        end = SUPERBLOCK_BYTES
    if aligned(end) != superblock.directory_offset:
        refuse("directory, offset", f"{aligned(end)}, after the last section", superblock.directory_offset)
    return tuple(sections)


def _section(item: Any, where: str) -> Section:
    fields = Fields(
        item, where, ("codec", "hash", "kind", "length", "offset"), ("chunks", "decoded_length", "name", "stored_hash")
    )
    kind, codec = fields.choice("kind", SECTION_KINDS), fields.choice("codec", (CODEC_RAW, CODEC_ZSTD))
    extra = {key for key in ("chunks", "decoded_length", "name", "stored_hash") if key in fields}
    expected = ({"name"} if kind == "blob" else set()) | (
        {"chunks", "decoded_length", "stored_hash"} if codec == CODEC_ZSTD else set()
    )
    if extra != expected:
        refuse(where, f"the keys {sorted(expected)} for a {codec} {kind}", sorted(extra))
    length, digest = fields.integer("length"), fields.digest("hash")
    packed = codec == CODEC_ZSTD
    section = Section(
        kind=kind,
        offset=fields.integer("offset"),
        length=length,
        hash=digest,
        codec=codec,
        decoded_length=fields.integer("decoded_length", 1) if packed else length,
        stored_hash=fields.digest("stored_hash") if packed else digest,
        chunks=tuple(fields.list("chunks", MAX_VALUES)) if packed else (),
        name=fields.text("name") if kind == "blob" else None,
    )
    if packed:
        _check_chunks(section, where)
    return section


def _check_chunks(section: Section, where: str) -> None:
    most = MAX_ZSTD_EXPANSION * section.length
    if section.decoded_length > most:
        refuse(f"{where}, decoded_length", f"at most {most} bytes from {section.length}", section.decoded_length)
    count = -(-section.decoded_length // ZSTD_CHUNK_BYTES)
    if len(section.chunks) != count:
        refuse(f"{where}, chunks", f"{count} for {section.decoded_length} bytes", len(section.chunks))
    total = sum(integer(length, f"{where}, chunks", 1) for length in section.chunks)
    if total != section.length:
        refuse(f"{where}, chunks", f"a sum of {section.length} bytes", total)


class Claims:
    """Assigns the sections in file order, each once."""

    def __init__(self, sections: tuple[Section, ...]) -> None:
        self.sections = sections
        self.next = 0

    def take(self, kind: str, length: int, where: str, reference: int | None = None) -> int:
        """The number of the next section, which must be of this kind and have `length` decoded bytes."""
        number = self.next
        if reference is not None and reference != number:
            refuse(where, f"section {number} (sections are used once, in order)", f"section {reference}")
        if number == len(self.sections):
            refuse(where, f"a section {number}", f"a file with {number} sections")
        section = self.sections[number]
        if section.kind != kind:
            refuse(where, f"section {number} to be of kind {kind}", section.kind)
        if section.decoded_length != length:
            refuse(where, f"{length} bytes in section {number}", section.decoded_length)
        self.next += 1
        return number

    def take_blobs(self, names: Collection[str]) -> dict[str, int]:
        """The numbers of all remaining sections, which must be blobs in name order, with these names or x-…."""
        blobs: dict[str, int] = {}
        previous = ""
        for number in range(self.next, len(self.sections)):
            section = self.sections[number]
            if section.name is None:
                refuse(f"section {number}", "a tensor that uses it", "none")
            if section.name not in names and not section.name.startswith("x-"):
                refuse(f"section {number}, name", f"{', '.join(names)} or x-…", repr(section.name))
            if section.name <= previous:
                refuse(f"section {number}, name", f"blobs in name order, after {previous!r}", repr(section.name))
            if section.decoded_length > MAX_BLOB_BYTES:
                refuse(f"blob {section.name!r}", f"at most {MAX_BLOB_BYTES} bytes", section.decoded_length)
            blobs[section.name] = number
            previous = section.name
        return blobs
