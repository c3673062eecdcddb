"""Checks that hashes cannot make: that ranks and weights are valid. Opens a file, decodes all of it, changes nothing.

Rows are processed in blocks, so memory stays bounded for a tensor of any size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.errors import SemanticsError, UsageError, naming
from rkf.file.container import Container, open_file
from rkf.format.bitpack import unused_bits
from rkf.format.constants import KIND_MODEL, TOKENIZER, plane_bits
from rkf.format.fields import REMEDY, shown
from rkf.format.matrix import Affine, ClusteredMatrix, DenseTensor, Exceptions

# Weights decoded at a time. 4 M weights are 16 MB of f32, and as much again for indices and for temporaries.
_BLOCK_WEIGHTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Report:
    """A file that passed. weights: of all stored tensors, without aliases."""

    path: Path
    file_bytes: int
    tensors: int
    clustered: int
    weights: int


def verify(
    path: str | os.PathLike[str],
    *,
    values: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
    also: Callable[[Container], object] | None = None,
) -> Report:
    """Check a model file on all three levels; progress is called with the name of each tensor that passed. also: called
    with a model's file at the end, for what this module knows nothing about (`rkf.text.tokenizer.open_tokenizer`).

    Raises everything that `open_file` raises, and SemanticsError for an index >= k, unused bits that are set, counts
    that are wrong, a weight that is not finite, or a tokenizer that is not JSON or has ids beyond the vocabulary.
    """
    with open_file(path, values=values) as container:
        if container.kind != KIND_MODEL:
            raise UsageError(f"{path}: is a values file, which needs its model: verify the model with --values")
        stored = {name: entry for name, entry in container.tensors.items() if entry.target is None}
        with naming(container.path):
            for name, tensor in container.load_many(stored):
                _check_tensor(tensor, f"tensor {name!r}")
                if progress is not None:
                    progress(name)
            if container.model is not None:
                _check_tokenizer(container.blob(TOKENIZER) or b"", container.model.vocab_size)
                if also is not None:
                    also(container)
        clustered = sum(entry.kind == "clustered" for entry in stored.values())
        weights = sum(entry.weights for entry in stored.values())
        return Report(container.path, container.file_bytes, len(stored), clustered, weights)


def _check_tensor(tensor: DenseTensor | ClusteredMatrix, where: str) -> None:
    if isinstance(tensor, DenseTensor):
        if not np.isfinite(tensor.decode()).all():
            raise SemanticsError(f"{where}: expected finite weights, got NaN or infinity; convert it again")
        return
    counts = np.zeros_like(tensor.counts)
    for first_table, block in _blocks(tensor):
        found = _check_block(block, where)
        counts[first_table : first_table + len(found)] += found
    if not np.array_equal(counts, tensor.counts):
        table, rank = (int(i) for i in np.argwhere(counts != tensor.counts)[0])
        expected, got = int(counts[table, rank]), int(tensor.counts[table, rank])
        place = f"rank {rank} of table {table}"
        raise SemanticsError(f"{where}, counts: expected {expected} for {place}, got {got}; {REMEDY}")


def _check_block(block: ClusteredMatrix, where: str) -> NDArray[np.uint64]:
    """Check some rows. The number of times each rank occurs in them, u64[tables, k]."""
    for number, (plane, width) in enumerate(zip(block.planes, plane_bits(block.bits), strict=True)):
        if unused_bits(plane, width, block.columns).any():
            raise SemanticsError(f"{where}, plane {number}: expected zeros in the unused bits of each row; {REMEDY}")
    indices = block.indices()
    if int(indices.max()) >= block.k:
        raise SemanticsError(f"{where}: expected indices below {block.k}, got {int(indices.max())}; {REMEDY}")
    if not _is_finite(block):
        raise SemanticsError(f"{where}: expected finite weights, got an overflow of a * centroid + b; {REMEDY}")
    if len(block.centroids) == 1:
        found = np.bincount(indices.ravel(), minlength=block.k)
    else:
        tables = np.arange(block.rows)[:, None] // block.rows_per_table
        found = np.bincount((tables * block.k + indices).ravel(), minlength=block.centroids.size)
    return found.astype(np.uint64).reshape(-1, block.k)


def _is_finite(block: ClusteredMatrix) -> bool:
    """Whether every weight is finite. If the largest factors cannot overflow, nothing has to be decoded."""
    a, b = (None, None) if block.affine is None else (block.affine.a, block.affine.b)
    bound = float(np.abs(block.centroids).max())
    bound = bound * (1 if a is None else float(a.max())) + (0 if b is None else float(np.abs(b).max()))
    if bound < float(np.finfo(np.float32).max) / 2:  # half: room for the rounding of each step
        return True
    return bool(np.isfinite(block.decode()).all())


def _blocks(matrix: ClusteredMatrix) -> Iterator[tuple[int, ClusteredMatrix]]:
    """The matrix in blocks of rows, with the number of each first table. A block is whole tables, or part of one."""
    rows = max(1, _BLOCK_WEIGHTS // matrix.columns)
    per_table = matrix.rows_per_table
    if rows > per_table:
        rows -= rows % per_table
    for table_start in range(0, matrix.rows, max(rows, per_table)):
        table_stop = min(matrix.rows, table_start + max(rows, per_table))
        for start in range(table_start, table_stop, rows):
            yield start // per_table, _rows(matrix, start, min(start + rows, table_stop))


def _rows(matrix: ClusteredMatrix, start: int, stop: int) -> ClusteredMatrix:
    """Rows start to stop as a matrix of their own."""
    first, last = start // matrix.rows_per_table, (stop - 1) // matrix.rows_per_table
    affine, exceptions = matrix.affine, matrix.exceptions
    if affine is not None and affine.granularity != "tensor":
        a, b = (None if factor is None else factor[start:stop] for factor in (affine.a, affine.b))
        affine = Affine(affine.granularity, affine.group, a, b)
    if exceptions is not None:
        begin, end = np.searchsorted(exceptions.positions, [start * matrix.columns, stop * matrix.columns])
        positions = exceptions.positions[begin:end] - exceptions.positions.dtype.type(start * matrix.columns)
        exceptions = Exceptions(positions, exceptions.values[begin:end], exceptions.dtype)
    return replace(
        matrix,
        shape=(stop - start, matrix.columns),
        planes=tuple(plane[start:stop] for plane in matrix.planes),
        centroids=matrix.centroids[first : last + 1],
        rows_per_table=min(matrix.rows_per_table, stop - start),
        affine=affine,
        exceptions=exceptions,
    )


def _check_tokenizer(data: bytes, vocab_size: int) -> None:
    """tokenizer.json must be JSON in UTF-8 (spec/metadata.md, section 5), its token ids integers below vocab_size."""
    where = f"blob {TOKENIZER!r}"
    try:
        ids = _token_ids(_json(data))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"  # the repr of a UnicodeError holds the whole text
        raise SemanticsError(f"{where}: expected a tokenizer in JSON, got {problem}; {REMEDY}") from None
    wrong = [token for token in ids if type(token) is not int or not 0 <= token < vocab_size]
    if wrong:
        raise SemanticsError(f"{where}: expected token ids from 0 to {vocab_size - 1}, got {shown(wrong[0])}; {REMEDY}")


def _json(data: bytes) -> Any:
    """JSON as RFC 8259 has it: UTF-8 without a mark, no NaN, no name twice in an object, no half of a surrogate pair.

    Raises ValueError. Python alone takes all of these, and other readers do not.
    """

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name}, which is no JSON")

    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{shown(name)} twice in an object")
            found[name] = value
        return found

    value = json.loads(
        data.decode(),
        parse_constant=refuse_constant,
        parse_int=lambda digits: -0.0 if digits == "-0" else int(digits),
        object_pairs_hook=each_once,
    )
    json.dumps(value, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    return value


def _token_ids(tokenizer: dict[str, Any]) -> list[Any]:
    """Ids of the vocabulary (a map token -> id, or a list whose index is the id) and of added tokens."""
    vocabulary, added = tokenizer["model"]["vocab"], tokenizer.get("added_tokens", [])
    if not isinstance(vocabulary, (dict, list)) or not isinstance(added, list):
        raise TypeError("a vocabulary or added tokens of another type")
    ids = list(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
    return ids + [token["id"] for token in added]
