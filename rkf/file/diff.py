"""How two files differ in terms of the model: indices that moved, centroids that drifted, metadata that changed.

Most tensors have equal hashes; only those that differ are decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.errors import UsageError
from rkf.file.container import Container, open_file
from rkf.file.structure import Structure
from rkf.format.matrix import ClusteredMatrix, Exceptions, MatrixValues


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> dict[str, Any]:
    """The changes from file `a` to file `b`: two models, or two values files.

    Keys: identical (no difference below); same_ranks and same_dense (of the whole files, by their ids); metadata and
    provenance: {dotted key: [in a, in b]}, None where absent; blobs: names that differ; only_a, only_b: tensors that
    only one file has; tensors: {name: changes}, where relative_rms = |b - a| / |a| over the decoded weights.
    """
    with open_file(a) as first, open_file(b) as second:
        if first.kind != second.kind:
            raise UsageError(f"{a}, {b}: expected two models or two values files, got one of each")
        common = [name for name in first.tensors if name in second.tensors]
        found: dict[str, Any] = {
            **_around(first, second),
            "tensors": {name: change for name in common if (change := _tensor(first, second, name))},
        }
        same = {"same_ranks": first.ranks_id == second.ranks_id, "same_dense": first.dense_id == second.dense_id}
        return {"identical": not any(found.values()), **same, **found}


def structural_diff(a: Structure, b: Structure) -> dict[str, Any]:
    """The changes that two directories show, by the hashes of sections: nothing is decoded.

    Keys as of `diff`, but tensors: {name: what differs}, of kind, shape, source_dtype, target, k and "data" (its ranks,
    or its values if it is dense); and same_values: whether all centroids, factors and exception values are equal.
    """
    if a.kind != b.kind:
        raise UsageError(f"{a.path}, {b.path}: expected two models or two values files, got one of each")
    common = [name for name in a.tensors if name in b.tensors]
    found: dict[str, Any] = {
        **_around(a, b),
        "tensors": {name: changes for name in common if (changes := _entries(a, b, name))},
    }
    values = [[each.hash for each in file.sections if each.kind == "values"] for file in (a, b)]
    same = {
        "same_ranks": a.ranks_id == b.ranks_id,
        "same_dense": a.dense_id == b.dense_id,
        "same_values": values[0] == values[1],
    }
    return {"identical": not any(found.values()) and all(same.values()), **same, **found}


def _around(a: Structure, b: Structure) -> dict[str, Any]:
    """The changes outside tensors."""
    return {
        "metadata": _changes(a.metadata, b.metadata),
        "provenance": _changes(a.provenance, b.provenance),
        "blobs": _blobs(a, b),
        "only_a": [name for name in a.tensors if name not in b.tensors],
        "only_b": [name for name in b.tensors if name not in a.tensors],
    }


def _entries(a: Structure, b: Structure, name: str) -> list[str]:
    left, right = a.tensors[name], b.tensors[name]
    keys = ("kind", "shape", "source_dtype", "target", "k")
    changed = [key for key in keys if getattr(left, key) != getattr(right, key)]
    hashes = [[file.sections[n].hash for n in file.tensors[name].sections] for file in (a, b)]
    return [*changed, *(["data"] if hashes[0] != hashes[1] else [])]


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    left, right = dict(_flat(a)), dict(_flat(b))
    keys = sorted(left.keys() | right.keys())
    return {key: [left.get(key), right.get(key)] for key in keys if left.get(key) != right.get(key)}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item


def _blobs(a: Structure, b: Structure) -> list[str]:
    left, right = ({name: c.sections[n].hash for name, n in c.directory.blobs.items()} for c in (a, b))
    return [name for name in sorted(left.keys() | right.keys()) if left.get(name) != right.get(name)]


def _tensor(a: Container, b: Container, name: str) -> dict[str, Any]:
    """The changes in a tensor; empty if there are none."""
    left, right = a.tensors[name], b.tensors[name]
    change: dict[str, Any] = {}
    for key in ("kind", "shape", "source_dtype", "target", "k"):
        old, new = getattr(left, key), getattr(right, key)
        if old != new:
            change[key] = [list(old), list(new)] if key == "shape" else [old, new]
    if "shape" in change or left.target is not None or right.target is not None or _same(a, b, name):
        return change
    if left.kind == "values":
        return change | _values(a.values(name), b.values(name))
    old_tensor, new_tensor = a.load(name), b.load(name)
    if isinstance(old_tensor, ClusteredMatrix) and isinstance(new_tensor, ClusteredMatrix):
        change |= _ranks(old_tensor, new_tensor) | _values(old_tensor.values, new_tensor.values)
        change |= _exceptions(old_tensor.exceptions, new_tensor.exceptions)
    return change | _weights(old_tensor.decode(), new_tensor.decode())


def _same(a: Container, b: Container, name: str) -> bool:
    """Whether the tensor is stored the same way: equal decoded sections, values and description of values."""
    (left, right), hashes = (a.tensors[name], b.tensors[name]), []
    for container, entry in ((a, left), (b, right)):
        hashes.append([container.sections[number].hash for number in entry.sections])
    if hashes[0] != hashes[1] or left.clusters != right.clusters:
        return False
    return left.clusters is None or _bytes(a.values(name)) == _bytes(b.values(name))


def _bytes(values: MatrixValues) -> list[bytes]:
    a, b = (None, None) if values.affine is None else (values.affine.a, values.affine.b)
    arrays = (values.centroids, a, b, values.exceptions)
    return [b"" if array is None else array.tobytes() for array in arrays]


def _ranks(a: ClusteredMatrix, b: ClusteredMatrix) -> dict[str, Any]:
    """Moves of indices; comparable only for equal k and tables."""
    if a.k != b.k or a.rows_per_table != b.rows_per_table:
        return {}
    moves = np.abs(a.indices().astype(np.int16) - b.indices())
    moved = int(np.count_nonzero(moves))
    return {"indices_moved": moved, "indices_share": moved / moves.size, "largest_move": int(moves.max())}


def _values(a: MatrixValues, b: MatrixValues) -> dict[str, Any]:
    change: dict[str, Any] = {}
    if a.centroids.shape == b.centroids.shape:
        drift = np.abs(a.centroids.astype(np.float64) - b.centroids)
        change = {"centroids_drifted": int(np.count_nonzero(drift)), "largest_drift": float(drift.max())}
    parts = [None if v.affine is None else (v.affine.granularity, v.affine.group) for v in (a, b)]
    if parts[0] != parts[1]:
        change["affine"] = [None if part is None else part[0] for part in parts]
    old, new = _bytes(a), _bytes(b)
    return {**change, "affine_changed": old[1:3] != new[1:3], "exception_values_changed": old[3] != new[3]}


def _exceptions(a: Exceptions | None, b: Exceptions | None) -> dict[str, int]:
    left, right = (np.empty(0, np.uint64) if e is None else e.positions for e in (a, b))
    kept = np.intersect1d(left, right, assume_unique=True).size
    return {"exceptions_added": right.size - kept, "exceptions_removed": left.size - kept}


def _weights(a: NDArray[np.float32], b: NDArray[np.float32]) -> dict[str, Any]:
    """The distance between decoded weights; None where the first are all zero."""
    distance, norm = (float(np.linalg.norm(x.astype(np.float64).ravel())) for x in (b - a, a))
    return {"weights_changed": int(np.count_nonzero(a != b)), "relative_rms": distance / norm if norm else None}
