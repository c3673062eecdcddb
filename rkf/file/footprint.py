"""How a file spends its bytes, and its size under an ideal entropy coder. Reads counts, decodes nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.errors import UsageError
from rkf.file.container import Container, open_file
from rkf.format.constants import CODEC_RAW, SUPERBLOCK_BYTES, index_bits, plane_bits
from rkf.format.tensors import TensorEntry


def footprint(path: str | os.PathLike[str], source: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """The ledger of a file.

    Keys: file_bytes; weights and clustered_weights (without aliases); bits_per_weight (the whole file over all
    weights); clustered_bits_per_weight (planes, counts, values and exceptions over the clustered weights); sections:
    bytes by content, with superblock, directory and padding, so that they add up to file_bytes; widths: matrices,
    weights and bytes of planes by index width; entropy_bits_per_weight: entropy of the ranks, from the counts;
    entropy_coded_bytes: the file size if its planes were coded at that rate. With a source (a file, or a folder of
    safetensors): source_bytes, ratio = source_bytes / file_bytes.
    """
    with open_file(path) as container:
        sections = _ledger(container)
        clustered = [entry for entry in container.tensors.values() if entry.kind == "clustered"]
        weights = sum(entry.weights for entry in container.tensors.values() if entry.kind in ("clustered", "dense"))
        clustered_weights = sum(entry.weights for entry in clustered)
        on_clusters = sum(size for key, size in sections.items() if key.startswith(_OF_CLUSTERS))
        rank_bits = sum(coded_bits(container.counts(entry.name)) for entry in clustered)
        planes = sum(size for key, size in sections.items() if key.startswith("ranks_"))
        ledger: dict[str, Any] = {
            "file_bytes": container.file_bytes,
            "weights": weights,
            "clustered_weights": clustered_weights,
            "bits_per_weight": _share(8 * container.file_bytes, weights),
            "clustered_bits_per_weight": _share(8 * on_clusters, clustered_weights),
            "entropy_bits_per_weight": _share(rank_bits, clustered_weights),
            "entropy_coded_bytes": container.file_bytes - planes + round(rank_bits / 8),
            "widths": _widths(container, clustered),
            "sections": sections,
        }
    if source is not None:
        ledger["source_bytes"] = _source_bytes(Path(source))
        ledger["ratio"] = ledger["source_bytes"] / ledger["file_bytes"]
    return ledger


_OF_CLUSTERS = ("ranks_", "counts", "centroids", "affine", "exception_", "values_packed")
_LEDGER = (
    "superblock",
    "ranks_4bit",
    "ranks_2bit",
    "ranks_1bit",
    "counts",
    "centroids",
    "affine",
    "exception_positions",
    "exception_values",
    "dense",
    "tokenizer.json",
    "chat_template.jinja",
    "directory",
    "padding",
)
_VALUE_KEYS = {"centroids": "centroids", "a": "affine", "b": "affine", "exceptions": "exception_values"}
_SECTION_KEYS = {"counts": "counts", "positions": "exception_positions", "dense": "dense"}


def coded_bits(counts: NDArray[np.uint64]) -> float:
    """Bits of an ideal coder for ranks that occur as in `counts: u64[tables, k]`, with a separate code per table."""
    occurring = counts.astype(np.float64)
    shares = occurring / np.maximum(occurring.sum(axis=1, keepdims=True), 1)
    logs = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
    return float(0.0 - (occurring * logs).sum())  # a minus sign would make -0.0 of one rank alone, which no file holds


def _ledger(container: Container) -> dict[str, int]:
    """Bytes by content; they add up to the file."""
    ledger = dict.fromkeys(_LEDGER, 0)
    parts = container.directory.parts
    ledger["superblock"] = SUPERBLOCK_BYTES * (1 + len(parts))
    ledger["directory"] = container.superblock.directory_length + sum(part.directory_length for part in parts)
    for entry in container.tensors.values():
        widths = () if entry.k is None else plane_bits(index_bits(entry.k))
        for number, width in zip(entry.sections, widths, strict=False):  # counts and positions follow the planes
            ledger[f"ranks_{width}bit"] += container.sections[number].length
    for section in container.sections:
        if section.kind in _SECTION_KEYS:
            ledger[_SECTION_KEYS[section.kind]] += section.length
        elif section.name is not None:
            ledger[section.name] = section.length
        elif section.kind == "values" and section.codec != CODEC_RAW:
            ledger["values_packed"] = section.length  # the fields share these bytes and have none of their own
        elif section.kind == "values":
            for fields in container.directory.values_fields.values():
                for key, field in fields.items():
                    ledger[_VALUE_KEYS[key]] += field.length
    ledger["padding"] = container.file_bytes - sum(ledger.values())
    return ledger


def _widths(container: Container, clustered: list[TensorEntry]) -> list[dict[str, int]]:
    """Matrices, weights and stored bytes of planes by k."""
    widths: dict[int, dict[str, int]] = {}
    for entry in clustered:
        k = entry.k or 0
        row = widths.setdefault(k, {"k": k, "bits": index_bits(k), "matrices": 0, "weights": 0, "bytes": 0})
        planes = entry.sections[: len(plane_bits(index_bits(k)))]
        row["matrices"] += 1
        row["weights"] += entry.weights
        row["bytes"] += sum(container.sections[number].length for number in planes)
    return [widths[k] for k in sorted(widths)]


def _share(bits: float, weights: int) -> float | None:
    return bits / weights if weights else None


def _source_bytes(source: Path) -> int:
    """Bytes of the source's weights."""
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{source}: expected a checkpoint file or a folder with safetensors, got neither")
    return sum(file.stat().st_size for file in files)
