"""Writes a model: streams tensors in name order, then the values of all tensors, then blobs.

The same calls give the same bytes. Everything that a reader would refuse is refused here before the file is committed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rkf.errors import UsageError, naming
from rkf.file.atomic import OutputFile, replacing, reporting
from rkf.file.part_writer import part_writer
from rkf.file.sections import SectionWriter
from rkf.format import integrity
from rkf.format.constants import (
    DTYPE_BYTES,
    KIND_MODEL,
    MAX_K,
    MIN_K,
    index_bits,
    plane_bits,
    position_bytes,
    row_bytes,
)
from rkf.format.directory import dense_id, ranks_id
from rkf.format.matrix import Alias, ClusteredMatrix, DenseTensor, MatrixValues, Tensor, storage_dtype
from rkf.format.values_layout import Clusters, ValuesSpec, fields


class Writer:
    """Writes a model file: `with Writer(path, metadata=…, provenance=…) as w: w.add(…); w.blob(…)`.

    Leaving the `with` commits (superblock last, rename); an exception leaves no file. metadata["model"] is
    `ModelMetadata.to_metadata()`: with it, the tensors must be the ones that its program reads. part_bytes: write the
    index of a model in parts, and the parts beside it, each of about so many bytes (`rkf.file.split`).

    Raises UsageError (the file exists, wrong order, arrays that do not fit together), OutputError (the disk),
    StructureError (what was added is not a valid file).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, Any],
        provenance: Mapping[str, Any],
        force: bool = False,
        part_bytes: int | None = None,
    ) -> None:
        self._path = Path(path)
        self._force = force
        self._part_bytes = part_bytes
        self._metadata = dict(metadata)
        self._provenance = dict(provenance)
        self._tensors: list[dict[str, Any]] = []
        self._values_written = False

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            out = stack.enter_context(self._output())
            if self._part_bytes is None:
                self._sections = SectionWriter(out)
            else:
                self._sections = stack.enter_context(part_writer(out, self._path, self._part_bytes, self._force))
            self._spool = stack.enter_context(ValuesSpool(self._path))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack, naming(self._path):
            self._commit()

    def add(self, name: str, tensor: Tensor, stats: Mapping[str, float] | None = None) -> None:
        """Write a tensor. Names come in order of their UTF-8 bytes. stats: finite numbers stored with it."""
        with naming(self._path):
            self._check_turn(name)
            if isinstance(tensor, Alias):
                entry: dict[str, Any] = {"kind": "alias", "target": tensor.target}
            elif isinstance(tensor, DenseTensor):
                entry = self._add_dense(name, tensor)
            else:
                entry = self._add_clustered(name, tensor)
            self._tensors.append({**entry, "name": name, **({"stats": dict(stats)} if stats else {})})

    def blob(self, name: str, data: bytes) -> None:
        """Write "chat_template.jinja", "tokenizer.json", … in name order, after the tensors."""
        with naming(self._path):
            self._finish_values()
            if not data:
                raise UsageError(f"blob {name!r}: expected at least one byte, got none")
            self._sections.add_blob(name, data)

    def _output(self) -> AbstractContextManager[OutputFile]:
        """The file to write to (a dry run counts bytes instead)."""
        return replacing(self._path, self._force)

    def _check_turn(self, name: str) -> None:
        if self._values_written:
            raise UsageError(f"tensor {name!r}: expected tensors before blobs")
        if self._tensors and name <= self._tensors[-1]["name"]:
            raise UsageError(f"tensor {name!r}: expected names in order, after {self._tensors[-1]['name']!r}")

    def _add_dense(self, name: str, tensor: DenseTensor) -> dict[str, Any]:
        if tensor.dtype not in DTYPE_BYTES:
            raise UsageError(f"tensor {name!r}: expected a dtype of {', '.join(DTYPE_BYTES)}, got {tensor.dtype!r}")
        data = expect(tensor.data, storage_dtype(tensor.dtype), tensor.shape, f"tensor {name!r}")
        number = self._sections.add("dense", [data])
        return {"kind": "dense", "data": number, "dtype": tensor.dtype, "shape": list(tensor.shape)}

    def _add_clustered(self, name: str, matrix: ClusteredMatrix) -> dict[str, Any]:
        where = f"tensor {name!r}"
        clusters = clusters_of(matrix, where)
        planes, counts, positions = _ranks(matrix, clusters, where)
        self._spool.add(where, clusters, matrix.values)
        entry: dict[str, Any] = {
            **clusters.to_map(),
            "kind": "clustered",
            "planes": [self._sections.add("plane", [plane]) for plane in planes],
            "counts": self._sections.add("counts", [counts]),
            "source_dtype": matrix.source_dtype,
        }
        if positions is not None:
            number = self._sections.add("positions", [positions])
            entry["exceptions"]["positions"] = number
        return entry

    def _finish_values(self) -> None:
        if not self._values_written:
            self._values_written = True
            self._spool.write_to(self._sections)

    def _commit(self) -> None:
        self._finish_values()
        directory = {
            "metadata": self._metadata,
            "provenance": self._provenance,
            "tensors": self._tensors,
            "ranks_id": ranks_id(self._tensors, self._sections.sections),
            "dense_id": dense_id(self._tensors, self._sections.sections),
        }
        self._sections.finish(directory, KIND_MODEL)


class ValuesSpool:
    """The values section while it grows: an anonymous file beside the output, which vanishes with the process."""

    def __init__(self, target: Path) -> None:
        with reporting(target):
            self._file = tempfile.TemporaryFile(dir=target.parent, buffering=0)  # noqa: SIM115  (see __exit__)
        self._out = OutputFile(self._file.fileno(), target)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, where: str, clusters: Clusters, values: MatrixValues, ascending: bool = True) -> None:
        """Append the fields of one tensor; tensors come in name order."""
        a, b = (None, None) if values.affine is None else (values.affine.a, values.affine.b)
        placed = fields(clusters, self._out.position)
        arrays = {"centroids": values.centroids, "a": a, "b": b, "exceptions": values.exceptions}
        checked = {
            key: expect(array, storage_dtype(placed[key].dtype), placed[key].shape, f"{where}, {key}")
            for key, array in arrays.items()
            if array is not None
        }
        problem = integrity.values_problem(values, ascending)
        if problem is not None:
            raise UsageError(f"{where}, {problem}")
        for key, field in placed.items():
            self._out.write(bytes(field.offset - self._out.position))
            self._out.write(checked[key])

    def write_to(self, sections: SectionWriter) -> None:
        """Append the values section, if there are any values."""
        if self._out.position:
            sections.add("values", [mmap.mmap(self._file.fileno(), self._out.position, access=mmap.ACCESS_READ)])


def expect(array: NDArray[Any], dtype: np.dtype[Any], shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """The array, C-contiguous; UsageError unless it has this dtype and shape."""
    if array.dtype != dtype or array.shape != shape:
        raise UsageError(f"{where}: expected {dtype} {list(shape)}, got {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array)


def values_spec(values: MatrixValues, where: str) -> ValuesSpec:
    """The description of these values for a directory."""
    affine = values.affine
    if affine is None:
        return ValuesSpec(exceptions=values.exceptions_dtype)
    names = {np.dtype("<f2"): "f16", np.dtype("<f4"): "f32"}
    for factor in (affine.a, affine.b):
        if factor is not None and factor.dtype not in names:
            raise UsageError(f"{where}, affine: expected float16 or float32, got {factor.dtype}")
    a, b = (None if factor is None else names[factor.dtype] for factor in (affine.a, affine.b))
    return ValuesSpec(affine.granularity, affine.group, a, b, values.exceptions_dtype)


def clusters_of(matrix: ClusteredMatrix, where: str) -> Clusters:
    """The sizes that a matrix declares."""
    if not MIN_K <= matrix.k <= MAX_K or not 1 <= matrix.rows_per_table <= matrix.rows:
        raise UsageError(
            f"{where}: expected k from {MIN_K} to {MAX_K} and rows_per_table from 1 to {matrix.rows}, "
            f"got {matrix.k} and {matrix.rows_per_table}"
        )
    count = 0 if matrix.exceptions is None else len(matrix.exceptions.positions)
    return Clusters(matrix.shape, matrix.k, matrix.rows_per_table, count, values_spec(matrix.values, where))


def _ranks(
    matrix: ClusteredMatrix, clusters: Clusters, where: str
) -> tuple[list[NDArray[Any]], NDArray[Any], NDArray[Any] | None]:
    """Planes, counts and exception positions, each checked against the sizes."""
    widths = plane_bits(index_bits(clusters.k))
    if len(matrix.planes) != len(widths):
        raise UsageError(f"{where}: expected {len(widths)} planes for k = {clusters.k}, got {len(matrix.planes)}")
    planes = [
        expect(plane, np.dtype(np.uint8), (clusters.rows, row_bytes(clusters.columns, width)), f"{where}, plane {i}")
        for i, (plane, width) in enumerate(zip(matrix.planes, widths, strict=True))
    ]
    counts = expect(matrix.counts, np.dtype("<u8"), (clusters.tables, clusters.k), f"{where}, counts")
    if matrix.exceptions is None:
        return planes, counts, None
    weights = clusters.rows * clusters.columns
    dtype = np.dtype(f"<u{position_bytes(weights)}")
    positions = expect(matrix.exceptions.positions, dtype, (clusters.exceptions,), f"{where}, exception positions")
    problem = integrity.positions_problem(positions, weights)
    if problem is not None:
        raise UsageError(f"{where}, {problem}")
    return planes, counts, positions
