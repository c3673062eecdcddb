"""Temporary folders that a killed process does not leave behind for good: the next one that needs one removes them.

Each user has one private folder in the system's folder for temporary files. A process locks its own folder in there,
and the system releases that lock however the process ends.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rkf.file.atomic import reporting
from rkf.file.private import private_folder

_LOCK = "lock"  # in the user's folder: held while folders are made or removed; in each of these: while it is in use


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is removed when the `with` ends. Raises OutputError if it cannot be made."""
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    home = Path(tempfile.gettempdir(), f"rkf-{user}")
    private_folder(home)
    with ExitStack() as stack:
        with reporting(home), _locked(home / _LOCK):
            for other in home.iterdir():
                if other.is_dir() and not _in_use(other):
                    shutil.rmtree(other, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(dir=home))
            stack.callback(remove_folder, folder)
            stack.enter_context(_locked(folder / _LOCK))
        yield folder


def remove_folder(folder: Path) -> None:
    """Remove a folder and all in it, as far as possible; if a signal comes in between, the rest too."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _in_use(folder: Path) -> bool:
    import portalocker

    try:
        with _locked(folder / _LOCK, wait=False):
            return False
    except portalocker.LockException:
        return True


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    import portalocker  # 20 ms, and most commands need no folder

    flags = portalocker.LOCK_EX if wait else portalocker.LOCK_EX | portalocker.LOCK_NB
    with path.open("ab") as file:
        portalocker.lock(file.fileno(), flags)
        yield
