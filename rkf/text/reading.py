"""Reads files of text: UTF-8 of a bounded size, or an error that names the file. Line breaks stay as they are."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from rkf.errors import UsageError

MOST = 1 << 28  # bytes: 60 million tokens, more than a night can evaluate; a device such as /dev/zero has no end

# First bytes of files that people give to models that see.
_KINDS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP image or a recording",
    b"%PDF": "a PDF document",
}


def read_text(path: Path) -> str:
    """The text of a file; UsageError if it cannot be read, is longer than `MOST`, or is not UTF-8."""
    try:
        with path.open("rb") as file:
            return read_stream(file, str(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def open_regular(path: Path) -> BinaryIO:
    """The open file; UsageError if it cannot be read, or is no regular file: a pipe is not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"{path}: expected a regular file, got a folder, pipe or device")
    return os.fdopen(descriptor, "rb")


def read_stream(stream: BinaryIO, label: str) -> str:
    """The text of an open stream to its end. label: its name in errors, which are those of `read_text`."""
    return decoded(read_bytes(stream, label), label)


def read_bytes(stream: BinaryIO, label: str) -> bytes:
    """What an open stream holds to its end; UsageError beyond `MOST`."""
    data = stream.read(MOST + 1)
    if len(data) > MOST:
        raise UsageError(f"{label}: expected at most {MOST} bytes of text: give a part of it")
    return data


def decoded(data: bytes, label: str) -> str:
    """UTF-8 as text; UsageError if it is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        kind = next((kind for magic, kind in _KINDS.items() if data.startswith(magic)), None)
        found = f", got {kind}; rkf reads text alone" if kind else f": {error}"
        raise UsageError(f"{label}: expected UTF-8 text{found}") from error
