"""`fold`: builds the values of a values file into a model file. Knows no training."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from rkf.file.container import open_file, refuse_input
from rkf.file.writer import Writer
from rkf.format.matrix import Alias


def fold(
    model: str | PathLike[str],
    values: str | PathLike[str],
    out: str | PathLike[str],
    *,
    provenance: Mapping[str, Any] | None = None,
    force: bool = False,
    part_bytes: int | None = None,
) -> None:
    """Write `out`: the ranks of `model` with `values`. provenance: keys to add to the model's. part_bytes: as for
    `Writer`.

    Raises UsageError (values for other ranks, unordered values, `out` exists or is `model`), OutputError.
    """
    refuse_input(out, model, values)
    with open_file(model, values=values) as container:
        told = {**container.provenance, **(provenance or {})}
        with Writer(out, metadata=container.metadata, provenance=told, force=force, part_bytes=part_bytes) as writer:
            for name, entry in container.tensors.items():
                if entry.target is not None:
                    writer.add(name, Alias(entry.target))
                    continue
                # The error belongs to the old values; the entropy belongs to the ranks and stays.
                stats = {key: value for key, value in entry.stats.items() if key != "relative_error"}
                writer.add(name, container.load(name), stats)
            for name in container.directory.blobs:
                writer.blob(name, container.blob(name) or b"")
            container.refuse_changed()
