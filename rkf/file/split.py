"""A model in parts, and whole again: `join(split(f)) == f`, byte for byte. Knows sections, not tensors."""

from __future__ import annotations

import os
from pathlib import Path

from rkf.errors import UsageError
from rkf.file.archive import Progress, copy_section, report, seal
from rkf.file.atomic import replacing
from rkf.file.container import Container, open_file, refuse_input
from rkf.file.part_writer import check_part_bytes, part_writer
from rkf.file.sections import SectionWriter
from rkf.format.constants import KIND_MODEL


def split(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    part_bytes: int,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a model as the index `target` and its parts beside it. part_bytes: most bytes of a part before its
    directory; a longer section has a part of its own.

    Raises UsageError if the source is no model or the target exists, OutputError if it cannot be written.
    """
    check_part_bytes(part_bytes)
    refuse_input(target, source)
    path = Path(target)
    with open_file(source) as container, replacing(path, force) as out:
        if container.kind != KIND_MODEL:
            raise UsageError(f"{source}: expected a model, got a values file, which is never in parts")
        with part_writer(out, path, part_bytes, force) as writer:
            _copy(container, writer, progress)


def join(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the model of the index `source` as one file: the file that was given to `split`.

    Raises UsageError if the source is whole or the target exists, OutputError if it cannot be written.
    """
    refuse_input(target, source)
    with open_file(source) as container, replacing(target, force) as out:
        if not container.directory.parts:
            raise UsageError(f"{source}: expected the index of a model in parts, got a whole file")
        _copy(container, SectionWriter(out), progress)


def _copy(container: Container, writer: SectionWriter, progress: Progress | None) -> None:
    for number in range(len(container.sections)):
        copy_section(container, number, writer)
        report(progress, container, number)
    seal(container, writer)
