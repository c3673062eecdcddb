"""The archive form: the same file with each section compressed losslessly. `unpack(pack(f)) == f`, byte for byte.

Blobs are compressed in a file ready to run too, so they stay as they are. Hashes that identify ranks are over decoded
bytes, so packing changes no identity. Knows sections, not tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate, islice, pairwise

from rkf.errors import UsageError
from rkf.file.atomic import replacing
from rkf.file.container import Container, open_file, refuse_input
from rkf.file.sections import SectionWriter
from rkf.format import codec
from rkf.format.constants import CODEC_RAW

Progress = Callable[[int, int], None]  # bytes of the input done, bytes in all


def pack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write `source` with zstd applied to the sections that it makes smaller; other sections, and blobs, stay.

    Raises UsageError if the file is packed already or the target exists, OutputError if it cannot be written.
    """
    refuse_input(target, source)
    with open_file(source) as container, replacing(target, force) as out:
        if any(section.codec != CODEC_RAW for section in container.sections if section.kind != "blob"):
            raise UsageError(f"{source}: expected a file in run form, got one that is packed already")
        writer = SectionWriter(out)
        jobs = (
            (chunk, section.kind)
            for number, section in enumerate(container.sections)
            if section.kind != "blob"
            for chunk in codec.chunks(container.stored(number))
        )
        frames = codec.in_order(_compressed, jobs)
        for number, section in enumerate(container.sections):
            if section.kind == "blob":
                copy_section(container, number, writer)
                continue
            packed = list(islice(frames, codec.chunk_count(section.length)))
            if codec.saves(sum(map(len, packed)), section.length):
                writer.add_zstd(section.kind, packed, section.length, section.hash, section.name)
            else:
                writer.add(section.kind, [container.stored(number)], section.name)
            report(progress, container, number)
        seal(container, writer)


def unpack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write `source` with every section raw, except blobs: this restores the file that was given to `pack`.

    Raises UsageError if the target exists, IntegrityError for a damaged section, OutputError if it cannot be written.
    """
    refuse_input(target, source)
    with open_file(source) as container, replacing(target, force) as out:
        writer = SectionWriter(out)
        raw = [number for number, section in enumerate(container.sections) if section.kind != "blob"]
        decoded = codec.in_order(container.section, raw)
        for number, section in enumerate(container.sections):
            if section.kind == "blob":
                copy_section(container, number, writer)
            else:
                writer.add(section.kind, [next(decoded)], section.name)
            report(progress, container, number)
        seal(container, writer)


def _compressed(job: tuple[memoryview, str]) -> bytes:
    chunk, kind = job
    return codec.compress_chunk(chunk, codec.LEVEL_OF_RANKS if kind == "plane" else codec.LEVEL_OF_REST)


def copy_section(container: Container, number: int, writer: SectionWriter) -> None:
    """Write a section as it is stored."""
    section, stored = container.sections[number], container.stored(number)
    if section.codec == CODEC_RAW:
        writer.add(section.kind, [stored], section.name)
    else:
        ends = [*accumulate(section.chunks, initial=0)]
        frames = [stored[start:end] for start, end in pairwise(ends)]
        writer.add_zstd(section.kind, frames, section.decoded_length, section.hash, section.name)


def report(progress: Progress | None, container: Container, number: int) -> None:
    """Tell that a section is done."""
    if progress is not None:
        section = container.sections[number]
        progress(section.offset + section.length, container.file_bytes)


def seal(container: Container, writer: SectionWriter) -> None:
    """Write the directory of `container` with the new sections; everything else in its maps stays."""
    container.refuse_changed()
    raw, superblock = container.directory.raw, container.superblock
    for section, old in zip(writer.sections, raw["sections"], strict=True):
        section.update({key: value for key, value in old.items() if key.startswith("x-")})
    writer.finish(raw, superblock.kind, superblock.minor, superblock.optional)
