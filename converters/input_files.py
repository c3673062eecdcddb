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

from rkf.errors import ChangedError, NotRkfError, SourceError
from rkf.file.mapped import mapped
from rkf.format.constants import MAX_BLOB_BYTES

# Bytes of a JSON file: parsed, nested lists take 25 times as much. The largest in use (the tokens of a
# tokenizer_config.json) have 1 MB.
MAX_JSON_BYTES = 8 << 20
# What a checkout without Git LFS has in place of a large file.
_LFS_POINTER = b"version https://git-lfs"


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


def read_bytes(path: Path, most: int = MAX_BLOB_BYTES) -> bytes:
    """The content of a file; SourceError if it cannot be read or is larger than `most` bytes, by default what a file
    that travels in an .rkf file may have.
    """
    try:
        size = path.stat().st_size
        if size > most:
            raise SourceError(f"{path}: {size} bytes, expected at most {most}")
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error


def refuse_pointer(path: Path) -> None:
    """Raise NotRkfError if the file is what Git LFS has in place of a file that was not fetched."""
    try:
        with path.open("rb") as file:
            found = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    if found == _LFS_POINTER:
        raise NotRkfError(f"{path}: a Git LFS pointer: fetch the file itself with `git lfs pull`")


def read_json(path: Path, optional: bool = False, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of a Hugging Face folder; {} if an optional file is absent. most: its bytes."""
    if not path.is_file():
        if optional:
            return {}
        raise SourceError(f"{path.parent}: {path.name} is missing; expected a Hugging Face folder")
    refuse_pointer(path)
    try:
        # In UTF-8 alone, as the reference reads it: these bytes travel in an .rkf file, and are exported.
        found = json.loads(read_bytes(path, most).decode(), object_pairs_hook=_object)
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
