"""Folders and files that rkf keeps for itself beside an output or in the cache: nobody else can have changed them.

A folder is the user's own, closed to others (0700) and no link. A file in it is read only if it is a regular file of
the user's. On Windows, where Python sees neither owners nor modes, only links and kinds of file are checked.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rkf.errors import OutputError
from rkf.file.atomic import reporting

_POSIX = hasattr(os, "geteuid")
# A pipe is opened without waiting for its other end, and then refused.
_READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


def private_folder(path: Path) -> None:
    """Make the folder and those above it, or accept one that is the user's own and that only the user could write to.

    Raises OutputError for any other, and if it cannot be made.
    """
    with reporting(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir(mode=0o700)
            return
        except FileExistsError:
            found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise OutputError(f"{path}: expected a folder of rkf's own, got a link or a file: move it away")
        if not _POSIX:
            return
        descriptor = os.open(path, _READ | os.O_DIRECTORY)
        try:
            found = os.fstat(descriptor)
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise OutputError(f"{path}: others than you may write to this folder: move it away")
            os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)


def read_private(path: Path, most: int) -> bytes | None:
    """The contents of a file in a private folder; None if there is none, and for what is not the user's own regular
    file of at most so many bytes.
    """
    try:
        descriptor = os.open(path, _READ)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        own = not _POSIX or found.st_uid == os.geteuid()
        if not stat.S_ISREG(found.st_mode) or not own or found.st_size > most:
            return None
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(found.st_size)
    finally:
        os.close(descriptor)
