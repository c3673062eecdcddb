"""Output files, complete or absent: sibling temporary file, fsync, rename, fsync of the folder. Knows no format.

The temporary file is named after the target and locked while it is written. A second writer is refused; the next writer
reuses the file that a killed writer left behind. Every byte goes through `os.write`, so tests can make it fail.
"""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rkf.errors import BusyError, OutputError, UsageError
from rkf.file.mapped import refuse_lost

_COPY_BYTES = 1 << 20  # bytes copied at a time where the kernel cannot copy
_WINDOWS = os.name == "nt"
# Flags that only some systems have. A link in place of the temporary file is never followed.
_OPEN = os.O_RDWR | os.O_CREAT | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_BINARY"))


class OutputFile:
    """A file being written from its start. position: bytes written so far."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self.position = 0

    def write(self, data: Any) -> None:
        """Append a buffer of bytes; OutputError when the disk is full or fails."""
        view = memoryview(data).cast("B")
        self.position += len(view)
        with reporting(self._path):
            while view:
                view = view[os.write(self._descriptor, view) :]

    def copy(self, source: int, offset: int, length: int) -> None:
        """Append bytes of an open file; the file system shares the blocks if it can."""
        end = self.position + length
        with reporting(self._path):
            while self.position < end:
                copied = _copy_range(source, self._descriptor, offset, end - self.position)
                self.position += copied
                offset += copied

    def overwrite_start(self, data: bytes) -> None:
        """Replace the first bytes of the file; `position` stays."""
        with reporting(self._path):
            os.lseek(self._descriptor, 0, os.SEEK_SET)
        end, self.position = self.position, 0
        self.write(data)
        self.position = end
        with reporting(self._path):
            os.lseek(self._descriptor, 0, os.SEEK_END)


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into OutputError."""
    try:
        yield
    except (OSError, ValueError) as error:
        remedy = "free some space" if getattr(error, "errno", None) == errno.ENOSPC else "nothing was written"
        raise OutputError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}; {remedy}") from None


@contextmanager
def replacing(path: str | os.PathLike[str], force: bool = False, private: bool = False) -> Iterator[OutputFile]:
    """A file that replaces `path` when the `with` ends, and leaves nothing behind when it raises.

    private: only its owner may read it.
    Raises UsageError if `path` exists and `force` is not given, OutputError if it cannot be written or another process
    is writing it.
    """
    named = Path(path)
    with ExitStack() as opened:
        with reporting(named):
            target = Path(os.path.realpath(path))
            temporary = partial(target)
            descriptor = _lock(temporary, named, 0o600 if private else 0o666)
        opened.callback(os.close, descriptor)
        try:
            refuse_existing(named, force)  # under the lock: another writer may have just finished
            with reporting(named):
                os.truncate(descriptor, 0)
            yield OutputFile(descriptor, named)
            refuse_lost()
            with reporting(named):
                os.fsync(descriptor)
                if _WINDOWS:
                    opened.close()  # an open file cannot be renamed there
                os.replace(temporary, target)  # noqa: PTH105  (the faults of the tests are injected into os.replace)
        except BaseException:
            if _WINDOWS:
                opened.close()
            with suppress(OSError):
                temporary.unlink()
            raise
    with reporting(named):
        _sync_folder(target.parent)


@contextmanager
def companions(path: Path, force: bool, is_companion: Callable[[Path], bool]) -> Iterator[Companions]:
    """Files beside `path` that take their names together when the `with` ends, and leave nothing when it raises. They
    belong to `path`: use this inside its `replacing`, so that `path` takes its name last.

    Files that have their names are replaced with `force`, or if `path` does not exist: a killed writer left them. Those
    of which `is_companion` is false are someone else's, and never replaced: UsageError.
    """
    made = Companions(path, force, is_companion)
    try:
        made.remove_partial()
        yield made
        refuse_lost()
        made.commit()
    except BaseException:
        made.discard()
        raise


class Companions:
    """See `companions`. names: of the files, in order; known before the `with` ends."""

    def __init__(self, path: Path, force: bool, is_companion: Callable[[Path], bool]) -> None:
        self._path, self._force, self._is_companion = path, force, is_companion
        self._open: list[tuple[int, Path]] = []
        self._placed: list[Path] = []
        self.names: list[str] = []

    def open(self) -> OutputFile:
        """The next file."""
        temporary = self._temporary(f"{len(self._open) + 1:05}")
        with reporting(self._path):
            self._open.append((os.open(temporary, _OPEN | os.O_TRUNC, 0o666), temporary))
        return OutputFile(self._open[-1][0], self._path)

    def commit(self) -> None:
        """Rename the files. One that names old files of these names is removed first, so no reader meets a mixture."""
        targets = [self._path.with_name(name) for name in self.names]
        with reporting(self._path):
            for descriptor, _ in self._open:
                os.fsync(descriptor)
            taken = [target for target in targets if target.exists()]
            for target in taken:
                if not self._is_companion(target):
                    raise UsageError(
                        f"{target}: exists already and is no part of a model: move it, or choose another name"
                    )
            if taken and self._path.exists():
                refuse_existing(taken[0], self._force)
                self._path.unlink()
            while self._open:
                descriptor, temporary = self._open.pop(0)
                os.close(descriptor)
                target = targets[len(self._placed)]
                self._placed.append(target)
                os.replace(temporary, target)  # noqa: PTH105  (as in `replacing`)
            _sync_folder(self._path.parent)

    def discard(self) -> None:
        """Remove what was written."""
        for descriptor, _ in self._open:
            os.close(descriptor)
        for target in self._placed:
            _remove(target)
        self.remove_partial()

    def remove_partial(self) -> None:
        """Remove files without their names: those of a killed writer too."""
        ours = glob.escape(self._temporary("").name.removesuffix(".partial"))
        for found in self._path.parent.glob(f"{ours}*.partial"):
            _remove(found)

    def _temporary(self, number: str) -> Path:
        return partial(self._path.with_name(f"{self._path.name}.part-{number}"))


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other processes from writing `path`, for an output that is a folder. Raises OutputError if one does."""
    with reporting(path):
        temporary = partial(Path(os.path.realpath(path)))
        descriptor = _lock(temporary, path, 0o600)
    try:
        yield
    finally:
        if _WINDOWS:
            os.close(descriptor)
        try:
            _remove(temporary)
        except KeyboardInterrupt:  # in its midst: the next writer would remove it, but nothing need be left
            _remove(temporary)
            raise
        if not _WINDOWS:
            os.close(descriptor)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def partial(target: Path) -> Path:
    """The path where a file is written before it is renamed; a killed writer leaves it."""
    return target.with_name(f".{target.name}.partial")


def refuse_same_file(output: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Raise OutputError if the output is one of the files that the call reads, also by a link; None is no file. Every
    function that writes a file calls this before its work, with all its inputs.
    """
    for each in inputs:
        if each is not None and _is_same(output, each):
            raise OutputError(f"{output}: the output is the input {Path(each).name}: choose another name")


def _is_same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    with reporting(Path(one)):
        try:
            return Path(one).samefile(other)
        except FileNotFoundError:
            return os.path.realpath(one) == os.path.realpath(other)


def refuse_existing(output: str | os.PathLike[str], force: bool) -> None:
    """Raise UsageError if the output exists and may not be overwritten, or is not a file. Callers that work for minutes
    before they write call this first, so that users learn of it at the start.
    """
    target = Path(output)
    with reporting(target):
        exists, is_file = target.exists(), target.is_file()
    if exists and not is_file:
        raise UsageError(f"{target}: expected the name of a file, got a folder or device")
    if exists and not force:
        raise UsageError(f"{target}: exists already: choose another name, or overwrite it with --force")


def _copy_range(source: int, target: int, offset: int, length: int) -> int:
    """Copy bytes from an offset of one descriptor to the position of another, in the kernel if possible. The number
    of bytes copied.
    """
    with suppress(OSError, AttributeError):  # not on this system, or not between these file systems
        copied = os.copy_file_range(source, target, length, offset)
        if copied:
            return copied
    data = _read_at(source, min(length, _COPY_BYTES), offset)
    if not data:
        raise OSError(errno.EIO, "the source became shorter while it was copied")
    return os.write(target, data)


def _read_at(descriptor: int, length: int, offset: int) -> bytes:
    if _WINDOWS:  # it has no pread
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)
    return os.pread(descriptor, length, offset)


def _lock(temporary: Path, target: Path, mode: int) -> int:
    """The descriptor of the temporary file, opened and locked."""
    import portalocker  # 20 ms, for writers only

    while True:
        with ExitStack() as undo:
            descriptor = os.open(temporary, _OPEN, mode)
            undo.callback(os.close, descriptor)
            try:
                portalocker.lock(descriptor, portalocker.LOCK_EX | portalocker.LOCK_NB)
            except portalocker.AlreadyLocked:
                problem = "another process is writing it: wait for it, or choose another name"
                raise BusyError(f"{target}: {problem}") from None
            except portalocker.LockException as error:
                problem = "this file system cannot lock files: write it to another one and copy it"
                raise OutputError(f"{target}: cannot be written: {problem} ({error})") from None
            if _has_name(descriptor, temporary):
                undo.pop_all()
                return descriptor


def _has_name(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`: its owner may have renamed it before we locked it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    if _WINDOWS:  # it cannot open a folder; NTFS journals a rename
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have no fsync of a folder
            raise
    finally:
        os.close(descriptor)
