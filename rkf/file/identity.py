"""Notices that a file changes while it is read, so that nothing is made of a mixture of old and new bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rkf.errors import ChangedError

Identity = tuple[int, ...] | None


def identity(path: Path) -> Identity:
    """What is another one after any change: device, number, size and times. No program can set the last time back.

    None if there is no such file.
    """
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def refuse_changed(before: Mapping[Path, Identity]) -> None:
    """Raise ChangedError if one of the files is another than it was."""
    for path, known in before.items():
        if identity(path) != known:
            raise ChangedError(f"{path}: changed while it was read: start again when nothing writes to it")
