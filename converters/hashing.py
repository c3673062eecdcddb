"""Hashes of input files: what provenance records and what a resumed conversion compares."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3


def hash_file(path: Path) -> str:
    """BLAKE3 (hex) of a file, read through a map and over all cores."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def files_fingerprint(files: Mapping[str, str]) -> str:
    """BLAKE3 (hex) over names and hashes, in name order."""
    return blake3("".join(f"{files[name]} {name}\n" for name in sorted(files)).encode()).hexdigest()
