"""Changes the description in a file: metadata, provenance, blobs. Tensors and values keep their places.

Nothing is edited in place: a new file is written beside the old one and renamed over it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rkf.errors import OutputError, UsageError, naming
from rkf.file.atomic import replacing, reporting
from rkf.file.container import open_file
from rkf.file.sections import SectionWriter
from rkf.format.constants import SUPERBLOCK_BYTES


def edit(
    path: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    metadata: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    blobs: Mapping[str, bytes | None] | None = None,
) -> None:
    """Rewrite `path` (or write `output`) with new metadata, provenance or blobs; None leaves one unchanged.

    metadata, provenance: whole maps. blobs: contents by name, None to remove one; blobs that are not named stay.
    Offsets of tensors do not change, and the file system shares their bytes between both files if it can.

    Raises StructureError if the result would not be a valid file, UsageError if `output` exists, OutputError.
    """
    with open_file(path) as container, replacing(output or path, force or output is None) as out:
        if container.directory.parts:
            raise UsageError(f"{path}: is in parts: put them together with `rkf join` first")
        raw, superblock = dict(container.directory.raw), container.superblock
        kept = {name: container.blob(name) for name in container.directory.blobs}
        wanted = {name: data for name, data in {**kept, **(blobs or {})}.items() if data is not None}
        before_blobs = len(container.sections) - len(kept)
        writer = SectionWriter(out)
        with reporting(container.path), container.path.open("rb", buffering=0) as file:
            if file.read(SUPERBLOCK_BYTES) != superblock.encode():
                raise OutputError(f"{path}: replaced by another process during the edit: edit it again")
            writer.copy(file.fileno(), raw["sections"][:before_blobs])
        for name in sorted(wanted):
            writer.add_blob(name, wanted[name])
        if metadata is not None:
            raw["metadata"] = dict(metadata)
        if provenance is not None:
            raw["provenance"] = dict(provenance)
        container.refuse_changed()
        with naming(Path(output or path)):
            writer.finish(raw, superblock.kind, superblock.minor, superblock.optional)
