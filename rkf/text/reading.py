"""Reads files of text: UTF-8, or an error that names the file."""

from __future__ import annotations

from pathlib import Path

from rkf.errors import UsageError


def read_text(path: Path) -> str:
    """The text of a file; UsageError if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: expected UTF-8 text: {error}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
