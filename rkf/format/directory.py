"""The directory: bytes to checked sections and tensors. Pure: knows no open file and reads no section.

Every declaration of a file is checked here before a view of it exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from rkf.format import canonical
from rkf.format.constants import (
    CHAT_TEMPLATE,
    FEATURE_PROGRAM,
    KIND_MODEL,
    KIND_VALUES,
    MAX_CONTAINERS,
    MAX_PARTS,
    TOKENIZER,
    VERBATIM,
)
from rkf.format.extents import Claims, Section, parse_sections
from rkf.format.fields import Fields, refuse
from rkf.format.part_directory import PartEntry, decoded, parse_parts
from rkf.format.superblock import Superblock
from rkf.format.tensors import TensorEntry, parse_tensors
from rkf.format.values_layout import Field, layout


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory that has passed every structural check. tensors and blobs are in name order."""

    sections: tuple[Section, ...]
    tensors: Mapping[str, TensorEntry]
    blobs: Mapping[str, int]  # name -> section
    values_section: int | None
    values_fields: Mapping[str, Mapping[str, Field]]
    metadata: Mapping[str, Any]
    provenance: Mapping[str, Any]
    ranks_id: bytes
    dense_id: bytes
    order: str
    parts: tuple[PartEntry, ...]  # of an index; otherwise none
    raw: Mapping[str, Any]  # the decoded map of the whole file, for tools that rewrite it


def parse_directory(data: bytes, superblock: Superblock) -> Directory:
    """The checked directory in `data`; StructureError names the section or tensor that is wrong."""
    raw = decoded(data, superblock)
    keys = ("dense_id", "metadata", "provenance", "ranks_id", "sections", "tensors")
    is_values = superblock.kind == KIND_VALUES
    also = ("order",) if is_values else ("parts",) if superblock.in_parts else ()
    top = Fields(raw, "directory", (*keys, *also))
    sections = parse_sections(top.list("sections", MAX_CONTAINERS), superblock)
    parts = parse_parts(top.list("parts", MAX_PARTS), sections) if superblock.in_parts else ()
    claims = Claims(sections)
    tensors = parse_tensors(top.list("tensors", MAX_CONTAINERS), claims, "values" if is_values else "model")
    clustered = [(entry.name, entry.clusters) for entry in tensors.values() if entry.clusters is not None]
    fields, values_length = layout(clustered)
    values = claims.take("values", values_length, "the values section") if clustered else None
    names = (CHAT_TEMPLATE, TOKENIZER, *(VERBATIM if superblock.required & FEATURE_PROGRAM else ()))
    blobs = claims.take_blobs(names)
    if is_values and blobs:
        refuse("directory", "no blobs in a values file", len(blobs))
    directory = Directory(
        sections=sections,
        tensors=tensors,
        blobs=blobs,
        values_section=values,
        values_fields=fields,
        metadata=top.map("metadata"),
        provenance=top.map("provenance"),
        ranks_id=top.digest("ranks_id"),
        dense_id=top.digest("dense_id"),
        order=top.choice("order", ("ascending", "none")) if is_values else "ascending",
        parts=parts,
        raw={key: value for key, value in raw.items() if key != "parts"} if parts else raw,
    )
    if superblock.kind == KIND_MODEL:
        _check_ids(raw)
    return directory


def ranks_id(tensors: Iterable[Mapping[str, Any]], sections: Sequence[Mapping[str, Any]]) -> bytes:
    """The identity of the ranks, independent of their codec: decoded hashes of planes, counts and exception positions.

    tensors, sections: maps as in a directory, tensors in name order.
    """
    rows = []
    for tensor in tensors:
        if tensor["kind"] == "clustered":
            planes = [sections[number]["hash"] for number in tensor["planes"]]
            counts = sections[tensor["counts"]]["hash"]
            positions = sections[tensor["exceptions"]["positions"]]["hash"] if "exceptions" in tensor else b""
            rows.append(
                [tensor["name"], tensor["shape"], tensor["k"], tensor["rows_per_table"], planes, counts, positions]
            )
    return blake3(canonical.encode(rows)).digest()


def dense_id(tensors: Iterable[Mapping[str, Any]], sections: Sequence[Mapping[str, Any]]) -> bytes:
    """The identity of the dense tensors; arguments as for `ranks_id`."""
    dense = (tensor for tensor in tensors if tensor["kind"] == "dense")
    rows = [[tensor["name"], tensor["shape"], tensor["dtype"], sections[tensor["data"]]["hash"]] for tensor in dense]
    return blake3(canonical.encode(rows)).digest()


def _check_ids(raw: Mapping[str, Any]) -> None:
    for key, computed in (("ranks_id", ranks_id), ("dense_id", dense_id)):
        expected = computed(raw["tensors"], raw["sections"])
        if expected != raw[key]:
            refuse(f"directory, {key}", expected.hex(), raw[key].hex())
