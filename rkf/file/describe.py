"""The contents of `rkf info` as plain data. Reads only the directory and renders no text."""

from __future__ import annotations

from typing import Any

from rkf.file.structure import Structure
from rkf.format.constants import KIND_VALUES, MAJOR, index_bits
from rkf.format.tensors import TensorEntry
from rkf.model.listing import summary


def describe(container: Structure, *, tensors: bool = False) -> dict[str, Any]:
    """Identity, model, provenance and sizes of a file; with `tensors`, also one map for each tensor."""
    entries = container.tensors.values()
    stored = [entry for entry in entries if entry.kind != "alias"]
    description: dict[str, Any] = {
        "path": str(container.path),
        "kind": "values" if container.kind == KIND_VALUES else "model",
        "version": f"{MAJOR}.{container.superblock.minor}",
        "file_bytes": container.file_bytes,
        **({"parts": [part.length for part in container.directory.parts]} if container.directory.parts else {}),
        "weights": sum(entry.weights for entry in stored),
        "clustered_weights": sum(entry.weights for entry in stored if entry.kind != "dense"),
        "tensor_count": len(entries),
        "order": container.order,
        "ranks_id": container.ranks_id.hex(),
        "dense_id": container.dense_id.hex(),
        "metadata": container.metadata,
        "provenance": container.provenance,
        "blobs": {section.name: section.decoded_length for section in container.sections if section.name is not None},
    }
    if container.model is not None:
        description["program"] = summary(container.model.program)
    if tensors:
        description["tensors"] = [_tensor(entry) for entry in entries]
    return description


def _tensor(entry: TensorEntry) -> dict[str, Any]:
    tensor: dict[str, Any] = {
        "name": entry.name,
        "kind": entry.kind,
        "shape": list(entry.shape),
        "dtype": entry.source_dtype,
    }
    if entry.target is not None:
        tensor["target"] = entry.target
    if entry.clusters is not None:
        clusters = entry.clusters
        tensor |= {"k": clusters.k, "bits": index_bits(clusters.k), "exceptions": clusters.exceptions}
        tensor["affine"] = "none" if clusters.values.granularity is None else clusters.values.granularity
    return tensor | ({"stats": dict(entry.stats)} if entry.stats else {})
