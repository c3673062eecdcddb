"""Values files: other centroids, affine factors and exception values for a model's ranks. Knows no training.

A values file is a container with only a values section. Hashes bind it to the ranks and the dense tensors of one model.
`open_file(model, values=…)` reads it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rkf.errors import UsageError, naming
from rkf.file.atomic import replacing
from rkf.file.container import Container, refuse_input
from rkf.file.sections import SectionWriter
from rkf.file.writer import ValuesSpool, values_spec
from rkf.format.constants import KIND_VALUES
from rkf.format.matrix import MatrixValues


def write_values(
    path: str | os.PathLike[str],
    container: Container,
    replacements: Mapping[str, MatrixValues],
    *,
    ordered: bool = True,
    metadata: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Write a values file for the model in `container`.

    replacements: new values by tensor name; the other clustered tensors keep the container's values. The ranks stay, so
    k, tables and the number of exceptions stay too; granularity and dtypes are free. ordered: centroids ascend, which
    prefixes of the planes need; False allows any finite centroids.

    Raises UsageError (an unknown or dense tensor, arrays that do not fit, the file exists), OutputError (the disk).
    """
    path = Path(path)
    clustered = {name: entry.clusters for name, entry in container.tensors.items() if entry.clusters is not None}
    for name in sorted(replacements):
        if name not in clustered:
            raise UsageError(f"{path}: tensor {name!r}: expected a clustered tensor of {container.path}, got none")
    if not clustered:
        raise UsageError(f"{path}: {container.path} has no clustered tensor: there are no values to write")
    refuse_input(path, container.path)
    with naming(path), replacing(path, force) as out, ValuesSpool(path) as spool:
        sections, tensors = SectionWriter(out), []
        for name, ranks in clustered.items():
            where = f"tensor {name!r}"
            values = replacements[name] if name in replacements else container.values(name)
            clusters = replace(ranks, values=values_spec(values, where))
            if (values.exceptions is None) != (ranks.exceptions == 0):
                raise UsageError(f"{where}: expected {ranks.exceptions} exception values, as the model has positions")
            spool.add(where, clusters, values, ascending=ordered)
            tensors.append({"kind": "values", "name": name, **clusters.to_map()})
        spool.write_to(sections)
        container.refuse_changed()
        directory = {
            "metadata": dict(metadata or {}),
            "provenance": dict(provenance or {}),
            "tensors": tensors,
            "ranks_id": container.ranks_id,
            "dense_id": container.dense_id,
            "order": "ascending" if ordered else "none",
        }
        sections.finish(directory, KIND_VALUES)
