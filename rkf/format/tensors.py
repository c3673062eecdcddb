"""Tensors of a directory: maps to checked entries. Reads no section; sizes are exact Python integers, from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from rkf.format.constants import (
    DTYPE_BYTES,
    GROUP_SIZES,
    MAX_DIMENSIONS,
    MAX_EXCEPTION_SHARE,
    MAX_K,
    MAX_WEIGHTS,
    MIN_K,
    index_bits,
    plane_bits,
    position_bytes,
    row_bytes,
)
from rkf.format.extents import Claims
from rkf.format.fields import Fields, integer, refuse, shown
from rkf.format.values_layout import Clusters, ValuesSpec


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's description in the directory. kind: "dense", "clustered", "alias", or "values" in a values file.

    An alias has the shape and source_dtype of its target. sections: numbers into `sections`, in file order.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    source_dtype: str
    sections: tuple[int, ...] = ()
    clusters: Clusters | None = None
    target: str | None = None
    stats: Mapping[str, float] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def k(self) -> int | None:
        """Centroids per table; None unless clustered."""
        return None if self.clusters is None else self.clusters.k

    @property
    def values(self) -> ValuesSpec | None:
        return None if self.clusters is None else self.clusters.values


def parse_tensors(items: list[Any], claims: Claims, kind: str) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    previous = ""
    for number, item in enumerate(items):
        entry = _tensor(item, f"tensor {number}", claims, kind)
        if entry.name <= previous:
            problem = "a duplicate" if entry.name == previous else "unsorted"
            refuse(f"tensor {entry.name!r}", f"tensors in name order, each once, after {previous!r}", problem)
        tensors[entry.name] = entry
        previous = entry.name
    return {name: _resolve(entry, tensors) for name, entry in tensors.items()}


_KINDS = {"model": ("alias", "clustered", "dense"), "values": ("values",)}
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alias": (("kind", "name", "target"), ()),
    "dense": (("data", "dtype", "kind", "name", "shape"), ("stats",)),
    "clustered": (
        ("counts", "k", "kind", "name", "planes", "rows_per_table", "shape", "source_dtype", "values"),
        ("exceptions", "stats"),
    ),
    "values": (("k", "kind", "name", "rows_per_table", "shape", "values"), ("exceptions",)),
}


def _tensor(item: Any, where: str, claims: Claims, file_kind: str) -> TensorEntry:
    head = Fields(item, where, ("kind", "name"), None)
    name, kind = head.text("name"), head.choice("kind", _KINDS[file_kind])
    fields = Fields(item, f"tensor {name!r}", *_KEYS[kind])
    if kind == "alias":
        return TensorEntry(name, kind, (), "", target=fields.text("target"))
    stats = fields.numbers("stats") if "stats" in fields else {}
    if kind == "dense":
        dtype, shape = fields.choice("dtype", tuple(DTYPE_BYTES)), _shape(fields, 1)
        data = claims.take("dense", prod(shape) * DTYPE_BYTES[dtype], fields.where, fields.integer("data"))
        return TensorEntry(name, kind, shape, dtype, (data,), stats=stats)
    clusters = _clusters(fields)
    if kind == "values":
        return TensorEntry(name, kind, clusters.shape, "", clusters=clusters)
    dtype = fields.choice("source_dtype", tuple(DTYPE_BYTES))
    sections = _rank_sections(fields, clusters, claims)
    return TensorEntry(name, kind, clusters.shape, dtype, sections, clusters, stats=stats)


def _shape(fields: Fields, least: int) -> tuple[int, ...]:
    where = fields.at("shape")
    shape = tuple(integer(size, where, 1) for size in fields.list("shape", MAX_DIMENSIONS))
    if len(shape) < least:
        refuse(where, f"{least} to {MAX_DIMENSIONS} dimensions", len(shape))
    if prod(shape) > MAX_WEIGHTS:
        refuse(where, f"at most {MAX_WEIGHTS} weights", prod(shape))
    return shape


def parse_clusters(item: Any, where: str) -> Clusters:
    """The inverse of `Clusters.to_map`. Raises StructureError for a map that describes no clustered tensor."""
    return _clusters(Fields(item, where, ("k", "rows_per_table", "shape", "values"), ("exceptions",)))


def _clusters(fields: Fields) -> Clusters:
    shape = _shape(fields, 2)
    k, rows_per_table = fields.integer("k", MIN_K, MAX_K), fields.integer("rows_per_table", 1, prod(shape[:-1]))
    exceptions = 0
    if "exceptions" in fields:
        exceptions = _exceptions(fields).integer("count", 1, prod(shape) // MAX_EXCEPTION_SHARE)
    values = _values(fields.inner("values", (), ("affine", "exceptions")))
    if (values.exceptions is None) != (exceptions == 0):
        refuse(fields.at("exceptions"), "both a count and a dtype of values, or neither", "one of them")
    return Clusters(shape, k, rows_per_table, exceptions, values)


def _exceptions(fields: Fields) -> Fields:
    """Positions belong to the ranks, so a values file has only a count."""
    return fields.inner("exceptions", ("count", "positions") if "planes" in fields else ("count",))


def _values(fields: Fields) -> ValuesSpec:
    dtype = fields.choice("exceptions", tuple(DTYPE_BYTES)) if "exceptions" in fields else None
    if "affine" not in fields:
        return ValuesSpec(exceptions=dtype)
    affine = fields.inner("affine", ("granularity",), ("a", "b", "group"))
    granularity = affine.choice("granularity", ("tensor", "row", "group"))
    if ("group" in affine) != (granularity == "group"):
        refuse(affine.at("group"), "a group size for the granularity group alone", granularity)
    if "a" not in affine and "b" not in affine:
        refuse(affine.where, "a or b", "neither")
    group = affine.choice("group", GROUP_SIZES) if granularity == "group" else None
    a, b = (affine.choice(key, ("f16", "f32")) if key in affine else None for key in ("a", "b"))
    return ValuesSpec(granularity, group, a, b, dtype)


def _rank_sections(fields: Fields, clusters: Clusters, claims: Claims) -> tuple[int, ...]:
    """Claim the planes, the counts and the exception positions of a clustered tensor."""
    widths = plane_bits(index_bits(clusters.k))
    planes = fields.list("planes", len(widths))
    if len(planes) != len(widths):
        refuse(fields.at("planes"), f"{len(widths)} planes for k = {clusters.k}", len(planes))
    taken = []
    for reference, width in zip(planes, widths, strict=True):
        size = clusters.rows * row_bytes(clusters.columns, width)
        taken.append(claims.take("plane", size, fields.where, integer(reference, fields.at("planes"))))
    taken.append(claims.take("counts", clusters.tables * clusters.k * 8, fields.where, fields.integer("counts")))
    if clusters.exceptions:
        size = clusters.exceptions * position_bytes(prod(clusters.shape))
        taken.append(claims.take("positions", size, fields.where, _exceptions(fields).integer("positions")))
    return tuple(taken)


def _resolve(entry: TensorEntry, tensors: Mapping[str, TensorEntry]) -> TensorEntry:
    if entry.target is None:
        return entry
    target = tensors.get(entry.target)
    if target is None or target.target is not None:
        problem = "nothing" if target is None else "an alias"
        refuse(f"tensor {entry.name!r}", "an alias of a stored tensor", f"{shown(entry.target)}, {problem}")
    return TensorEntry(entry.name, "alias", target.shape, target.source_dtype, target=entry.target)
