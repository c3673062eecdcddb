"""Reads a container: maps the file or its parts, checks them once, returns views.

*Structure* is checked at every open. *Integrity* (hashes, padding, the small arrays) is checked too, unless the caller
asks for structure only. *Semantics* are checked by `rkf.file.verify`. Views of raw sections are the mapped file itself;
nothing is copied. Knows no more of the model than the directory says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from rkf.errors import BindingError, CorruptError, IntegrityError, NotRkfError, UsageError, naming
from rkf.file.atomic import refuse_same_file
from rkf.file.body import Body, open_parts
from rkf.file.structure import Structure
from rkf.format import codec, integrity
from rkf.format.constants import (
    CODEC_RAW,
    KIND_MODEL,
    KIND_PART,
    KIND_VALUES,
    index_bits,
    plane_bits,
    position_bytes,
    row_bytes,
)
from rkf.format.fields import REMEDY
from rkf.format.matrix import F32, Affine, ClusteredMatrix, DenseTensor, Exceptions, MatrixValues, storage_dtype
from rkf.format.part_directory import index_name
from rkf.format.tensors import TensorEntry
from rkf.format.values_layout import Clusters
from rkf.model.metadata import ModelMetadata

Check = Literal["integrity", "structure"]
Load = Callable[[str], DenseTensor | ClusteredMatrix]


def open_file(
    path: str | os.PathLike[str], *, check: Check = "integrity", values: str | os.PathLike[str] | None = None
) -> Container:
    """Open an rkf file for reading.

    path: a model file, the index of a model in parts, or a values file to inspect. check: "integrity" (the default)
    reads and hashes every byte; "structure" reads only superblocks and directories. values: a values file whose
    centroids, affine factors and exception values replace the model's own.

    Raises NotRkfError, UnsupportedError, StructureError, IntegrityError, BindingError (values made for another model),
    UsageError (no such file).
    """
    if check not in ("integrity", "structure"):
        raise UsageError(f"{path}: check: expected 'integrity' or 'structure', got {check!r}")
    container = Container(Path(path), check)
    if values is not None:
        container.apply_values(Container(Path(values), check))
    return container


class Container(Structure):
    """An open file. Tensors are views of the map. They stay valid after `close`: the map lives as long as they do."""

    def __init__(self, path: Path, check: Check) -> None:
        self._check = check
        with naming(path):
            body = Body(path)
            if body.superblock.kind == KIND_PART:
                index = index_name(path.name) or "the index"
                raise UsageError(f"is one part of a model: open {index}; `rkf verify` checks a part alone")
            super().__init__(path, body.superblock, body.directory)
            parts = self.directory.parts
            # The sections of each file: of an index none, of its parts all.
            self._bodies = [(body, () if parts else self.sections)]
            self._bodies += zip(open_parts(path, parts), (part.sections for part in parts), strict=True)
            self._places = [(each, section) for each, sections in self._bodies for section in sections]
            self._values = self  # the container that holds the centroids, affine factors and exception values
            self._load: Load = self._read
            self.changes: tuple[str, ...] = ()  # of the model since it was opened: `run_as`
            if check == "integrity":
                self._check_integrity()

    def load(self, name: str) -> DenseTensor | ClusteredMatrix:
        """A tensor as views of the map where its sections are raw; follows an alias. Thread-safe.

        Raises UsageError for an unknown name, IntegrityError for a packed section that does not decode to its hash.
        """
        if self.kind != KIND_MODEL:
            raise UsageError(f"{self.path}: a values file has no ranks: open the model with values={self.path.name!r}")
        return self._load(name)

    def _read(self, name: str) -> DenseTensor | ClusteredMatrix:
        entry = self._entry(name)
        with naming(self.path):
            if entry.clusters is not None:
                return self._matrix(entry, entry.clusters)
            data = self._array(entry.sections[0], storage_dtype(entry.source_dtype), entry.shape)
            return DenseTensor(entry.source_dtype, data)

    def stored_name(self, name: str) -> str:
        """The tensor that stores a tensor's numbers: an alias followed, any other name as it is."""
        entry = self.tensors.get(name)
        return name if entry is None or entry.target is None else entry.target

    def load_many(self, names: Iterable[str]) -> Iterator[tuple[str, DenseTensor | ClusteredMatrix]]:
        """Tensors in order, with their names; packed ones are decoded ahead on all cores."""
        names = tuple(names)
        return zip(names, codec.in_order(self.load, names), strict=True)

    def decode(self, name: str) -> F32:
        """The weights of a tensor, `f32[shape]`."""
        return self.load(name).decode()

    def values(self, name: str) -> MatrixValues:
        """The centroids, affine factors and exception values of a clustered tensor, as views."""
        with naming(self._values.path):
            return self._values._own_values(self._entry(name).name)

    def counts(self, name: str) -> NDArray[np.uint64]:
        """How often each rank of a clustered tensor occurs, `u64[tables, k]`."""
        entry = self._entry(name)
        if entry.kind != "clustered" or entry.clusters is None:
            raise UsageError(f"{self.path}: tensor {name!r}: expected a clustered tensor, got kind {entry.kind!r}")
        number = entry.sections[len(plane_bits(index_bits(entry.clusters.k)))]
        return self._array(number, np.dtype("<u8"), (entry.clusters.tables, entry.clusters.k))

    def blob(self, name: str) -> bytes | None:
        """The bytes of "tokenizer.json", "chat_template.jinja", …; None where the file has none."""
        number = self.directory.blobs.get(name)
        return None if number is None else self.section(number).tobytes()

    def section(self, number: int) -> NDArray[np.uint8]:
        """The decoded bytes of a section: `u8[decoded_length]`."""
        section, stored = self.sections[number], self.stored(number)
        if section.codec == CODEC_RAW:
            return np.frombuffer(stored, np.uint8)
        with naming(self.path):
            where = section.label(number)
            decoded = codec.decompress(stored, section.chunks, section.decoded_length, where)
            if self._check == "integrity":
                integrity.check_hash(decoded, section.hash, where)
            return decoded

    def stored(self, number: int) -> memoryview:
        """The stored bytes of a section."""
        body, section = self._places[number]
        return body.stored(section)

    @property
    def values_id(self) -> bytes:
        """The hash of the values in use, of this file or of the one applied to it; empty if nothing is clustered."""
        number = self._values.directory.values_section
        return b"" if number is None else self._values.sections[number].hash

    def apply_values(self, values: Container) -> None:
        """Use the values of a values file from now on; BindingError if it was made for another model."""
        if self.kind != KIND_MODEL or values.kind != KIND_VALUES:
            raise UsageError(f"{values.path}: expected a values file to apply to a model, got kind {values.kind}")
        _check_binding(self, values)
        self._values = values
        self.order = values.order
        entries = {name: replace(self.tensors[name], clusters=entry.clusters) for name, entry in values.tensors.items()}
        self.tensors = MappingProxyType({**self.tensors, **entries})

    def run_as(
        self, model: ModelMetadata, made: Mapping[str, Callable[[Load], DenseTensor | ClusteredMatrix]], change: str
    ) -> None:
        """Give this model from now on. made: the tensors of its program that differ from those so far, by the names
        under which they are stored; each is made when it is loaded, from `load` as it was. change: what tells this
        change from others, such as a hash.
        """
        before = self._load

        def load(name: str) -> DenseTensor | ClusteredMatrix:
            make = made.get(self.stored_name(name))
            return before(name) if make is None else make(before)

        self.model, self._load = model, load
        self.changes += (change,)

    def refuse_changed(self) -> None:
        """Raise ChangedError if a file is not as it was at open. Called before another file made of it is committed."""
        for body, _ in self._bodies:
            body.refuse_changed()
        if self._values is not self:
            self._values.refuse_changed()

    def close(self) -> None:
        """Release the map. Views that are still in use keep it alive; nothing new can be loaded."""
        if self._values is not self:
            self._values.close()
        self.__dict__.pop("_value_bytes", None)
        for body, _ in self._bodies:
            body.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entry(self, name: str) -> TensorEntry:
        """The entry of a stored tensor, with aliases followed."""
        entry = self.tensors.get(name)
        if entry is None:
            raise UsageError(f"{self.path}: no tensor {name!r}: `rkf info --tensors` lists them")
        return entry if entry.target is None else self.tensors[entry.target]

    def _array(self, number: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        return self.section(number).view(dtype).reshape(shape)

    def _matrix(self, entry: TensorEntry, clusters: Clusters) -> ClusteredMatrix:
        widths = plane_bits(index_bits(clusters.k))
        planes = tuple(
            self._array(number, np.dtype(np.uint8), (clusters.rows, row_bytes(clusters.columns, width)))
            for number, width in zip(entry.sections, widths, strict=False)  # counts and positions follow the planes
        )
        values = self._values._own_values(entry.name)
        positions, exceptions = self._positions(entry, clusters), None
        if positions is not None and values.exceptions is not None and values.exceptions_dtype is not None:
            exceptions = Exceptions(positions, values.exceptions, values.exceptions_dtype)
        return ClusteredMatrix(
            shape=clusters.shape,
            planes=planes,
            counts=self.counts(entry.name),
            centroids=values.centroids,
            rows_per_table=clusters.rows_per_table,
            source_dtype=entry.source_dtype,
            affine=values.affine,
            exceptions=exceptions,
        )

    def _positions(self, entry: TensorEntry, clusters: Clusters) -> NDArray[Any] | None:
        """The positions of exceptions, checked; None without exceptions, and for a values file."""
        if not clusters.exceptions or entry.kind != "clustered":
            return None
        dtype = np.dtype(f"<u{position_bytes(entry.weights)}")
        positions = self._array(entry.sections[-1], dtype, (clusters.exceptions,))
        problem = integrity.positions_problem(positions, entry.weights)
        if problem is not None:
            raise IntegrityError(f"tensor {entry.name!r}, {problem}; {REMEDY}")
        return positions

    @cached_property
    def _value_bytes(self) -> NDArray[np.uint8]:
        number = self.directory.values_section
        return np.empty(0, np.uint8) if number is None else self.section(number)

    def _own_values(self, name: str) -> MatrixValues:
        """Views of this file's own values for a tensor, checked."""
        clusters = self.directory.tensors[name].clusters
        if clusters is None:
            raise UsageError(f"{self.path}: tensor {name!r} is dense: it has no centroids")
        spec = clusters.values
        arrays = {
            key: self._value_bytes[field.offset : field.offset + field.length]
            .view(storage_dtype(field.dtype))
            .reshape(field.shape)
            for key, field in self.directory.values_fields[name].items()
        }
        affine = None
        if spec.granularity is not None:
            affine = Affine(spec.granularity, spec.group, arrays.get("a"), arrays.get("b"))
        values = MatrixValues(arrays["centroids"], affine, arrays.get("exceptions"), spec.exceptions)
        problem = integrity.values_problem(values, self.directory.order == "ascending")
        if problem is not None:
            raise IntegrityError(f"tensor {name!r}, {problem}; {REMEDY}")
        return values

    def _check_integrity(self) -> None:
        """Check the hashes, the padding and the contents of the small arrays."""
        for body, sections in self._bodies:
            with naming(body.path):
                body.check_integrity(sections)
        fields = (field for placed in self.directory.values_fields.values() for field in placed.values())
        extents = [(field.offset, field.offset + field.length) for field in fields]
        integrity.check_padding(self._value_bytes.data, extents, len(self._value_bytes), "values section")
        for entry in self.directory.tensors.values():
            if entry.clusters is not None:
                self._own_values(entry.name)
                self._positions(entry, entry.clusters)


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a model: `path`, and its parts if it is their index, in order."""
    with Container(Path(path), "structure") as container:
        return [body.path for body, _ in container._bodies]


def refuse_input(output: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """`refuse_same_file`, also for the parts of each input that is the index of a model in parts."""
    for each in inputs:
        refuse_same_file(output, each)
        if each is not None and Path(each).is_file():
            with suppress(CorruptError, NotRkfError, UsageError):  # another kind of file, or its reader will say
                refuse_same_file(output, *files_of(each))


def total_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a file, with those of its parts if it is the index of a model in parts."""
    with Container(Path(path), "structure") as container:
        return container.file_bytes


def _check_binding(model: Container, values: Container) -> None:
    for what, expected, got in (
        ("ranks", model.ranks_id, values.ranks_id),
        ("dense tensors", model.dense_id, values.dense_id),
    ):
        if expected != got:
            raise BindingError(
                f"{values.path}: made for {what} {got.hex()[:16]}…, but {model.path} has {expected.hex()[:16]}…; "
                "use the values file that was made for this model"
            )
    clustered = {name: entry.clusters for name, entry in model.tensors.items() if entry.kind == "clustered"}
    for name in sorted(clustered.keys() | values.tensors.keys()):
        ours, theirs = clustered.get(name), values.tensors[name].clusters if name in values.tensors else None
        if ours is None or theirs is None or replace(ours, values=theirs.values) != theirs:
            raise BindingError(
                f"{values.path}: tensor {name!r}: expected the values of the same tensor in {model.path}, got "
                f"{'none' if theirs is None else 'another shape, k or tables'}; write the values file again"
            )
