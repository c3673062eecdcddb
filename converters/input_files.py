"""Reads input files: JSON, ranges of values, hashes (recorded in provenance and compared by a resumed conversion)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from rkf.errors import ChangedError, SourceError
from rkf.file.mapped import mapped
from rkf.format.constants import MAX_BLOB_BYTES


def read_values(path: Path, dtype: np.dtype[Any], count: int, offset: int) -> NDArray[Any]:
    """`dtype[count]` at a byte offset, read, not mapped (a map counts as memory).

    Raises SourceError if it cannot be read, ChangedError if the file has become shorter.
    """
    try:
        values = np.fromfile(path, dtype, count, offset=offset)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(values) != count:
        raise ChangedError(f"{path}: changed while it was read: {len(values)} of {count} values at byte {offset}")
    return values


def read_bytes(path: Path) -> bytes:
    """The content of a file that travels in an .rkf file; SourceError if it cannot be read or is too large for that."""
    try:
        size = path.stat().st_size
        if size > MAX_BLOB_BYTES:
            raise SourceError(f"{path}: {size} bytes, expected at most {MAX_BLOB_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file of a Hugging Face folder; {} if an optional file is absent."""
    if not path.is_file():
        if optional:
            return {}
        raise SourceError(f"{path.parent}: {path.name} is missing; expected a Hugging Face folder")
    try:
        found = json.loads(read_bytes(path), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file. Readers differ in which of two values they take, so there must not be two."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if value != found[key]:
                raise ValueError(f"key {key!r} occurs twice, with different values")
    return found


def shown_name(path: Path) -> str:
    """The last part of a path as text that a file can hold: bytes that are not UTF-8 are shown as escapes."""
    return os.fsencode(path.name).decode(errors="backslashreplace")


def hash_file(path: Path) -> str:
    """BLAKE3 (hex) of a file, read through a map on all cores."""
    digest = blake3(max_threads=blake3.AUTO)
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
            with mapped(file.fileno(), path) as data:
                digest.update(data)
    return digest.hexdigest()


def files_fingerprint(files: Mapping[str, str]) -> str:
    """BLAKE3 (hex) of names and hashes, in name order."""
    return blake3("".join(f"{files[name]} {name}\n" for name in sorted(files)).encode()).hexdigest()
