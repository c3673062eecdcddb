"""The layout of the values section. Offsets are derived from the directory, never stored.

Tensors are in name order, each with centroids, a, b, exception values. Every field begins at a multiple of ALIGNMENT
inside the section. Sizes are exact Python integers: nothing here can overflow for any declared size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from rkf.format.constants import DTYPE_BYTES, aligned


@dataclass(frozen=True, slots=True)
class ValuesSpec:
    """The description of a clustered tensor's values. A dtype of None means that the field does not exist."""

    granularity: str | None = None  # "tensor", "row" or "group"
    group: int | None = None
    a: str | None = None
    b: str | None = None
    exceptions: str | None = None

    def to_map(self) -> dict[str, Any]:
        """The description as a map for a directory."""
        affine = {"granularity": self.granularity, "group": self.group, "a": self.a, "b": self.b}
        described = {"affine": {key: value for key, value in affine.items() if value is not None}}
        return {
            **(described if self.granularity is not None else {}),
            **({"exceptions": self.exceptions} if self.exceptions is not None else {}),
        }

    def factors(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of a and b: [1], [rows] or [rows, groups]."""
        if self.granularity == "group":
            return (rows, -(-columns // (self.group or columns)))
        return (rows,) if self.granularity == "row" else (1,)


@dataclass(frozen=True, slots=True)
class Field:
    """An array inside the values section. offset: bytes from the section's start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def length(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Clusters:
    """The numbers that determine the sizes of a clustered tensor's arrays."""

    shape: tuple[int, ...]
    k: int
    rows_per_table: int
    exceptions: int
    values: ValuesSpec

    def to_map(self) -> dict[str, Any]:
        """The keys for a directory."""
        return {
            "k": self.k,
            "rows_per_table": self.rows_per_table,
            "shape": list(self.shape),
            "values": self.values.to_map(),
            **({"exceptions": {"count": self.exceptions}} if self.exceptions else {}),
        }

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def tables(self) -> int:
        return -(-self.rows // self.rows_per_table)


def fields(clusters: Clusters, offset: int) -> dict[str, Field]:
    """The fields of one tensor, from the first multiple of ALIGNMENT at or after `offset`, in file order."""
    spec, factors = clusters.values, clusters.values.factors(clusters.rows, clusters.columns)
    wanted = (
        ("centroids", "f32", (clusters.tables, clusters.k)),
        ("a", spec.a, factors),
        ("b", spec.b, factors),
        ("exceptions", spec.exceptions, (clusters.exceptions,)),
    )
    placed: dict[str, Field] = {}
    for name, dtype, shape in wanted:
        if dtype is not None:
            placed[name] = field = Field(dtype, shape, aligned(offset))
            offset = field.offset + field.length
    return placed


def end(placed: Mapping[str, Field]) -> int:
    """The end of the last of a tensor's fields."""
    last = list(placed.values())[-1]
    return last.offset + last.length


def layout(tensors: Iterable[tuple[str, Clusters]]) -> tuple[dict[str, dict[str, Field]], int]:
    """The fields of every tensor by name (given in name order), and the section's length."""
    placed: dict[str, dict[str, Field]] = {}
    offset = 0
    for name, clusters in tensors:
        placed[name] = fields(clusters, offset)
        offset = end(placed[name])
    return placed, offset
