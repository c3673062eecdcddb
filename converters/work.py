"""The work folder beside an output: the finished tensors of an interrupted conversion, for exactly one job.

Each finished tensor is a separate rkf file, so it is complete or absent and all its bytes are hashed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rkf.errors import CorruptError, NotRkfError, OutputError, UsageError
from rkf.file import kept_json
from rkf.file.atomic import OutputFile, partial, replacing, reporting
from rkf.file.container import open_file
from rkf.file.private import private_folder, read_private
from rkf.file.writer import Writer
from rkf.format.matrix import ClusteredMatrix

JOB, FINISHED = "job.json", "[0-9]" * 6 + ".rkf"
_KIND, _MOST = "job 1", 1 << 24  # of job.json; a recipe is part of it


class _FinishedWriter(Writer):
    """Writes in place and without fsync (10 ms each, a third of a small model's conversion). A part cut off, even by a
    power failure, fails its hashes and is made again."""

    @contextmanager
    def _output(self) -> Iterator[OutputFile]:
        with reporting(self._path):
            self._path.unlink(missing_ok=True)  # never overwritten: a damaged one may still be mapped
            file = self._path.open("xb", buffering=0)
        with file:
            yield OutputFile(file.fileno(), self._path)


class WorkFolder:
    """A folder beside `out`, named after it. The caller holds the lock of the output file, so it has one user at a
    time.
    """

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(f"{out.name}.work")
        self._opened = False

    def open(self, job: Mapping[str, Any], resume: bool) -> None:
        """Start this job, or continue it with `resume`. Raises UsageError if the folder belongs to another job."""
        private_folder(self.path)
        self._opened = True
        if not resume:
            self._empty()
        found = self._found_job()
        if found is not None and found != job:
            differing = ", ".join(sorted(key for key in {*found, *job} if found.get(key) != job.get(key)))
            raise UsageError(
                f"{self.path}: belongs to another job ({differing} differs): "
                "convert without --resume to start again, or choose another output"
            )
        if found is None:
            with replacing(self.path / JOB, force=True, private=True) as file:
                file.write(kept_json.sealed(_KIND, job))

    def save(self, number: int, name: str, matrix: ClusteredMatrix, stats: Mapping[str, float]) -> None:
        with _FinishedWriter(self._file(number), metadata={}, provenance={"tensor": name}) as writer:
            writer.add(name, matrix, stats)

    def load(self, number: int, name: str) -> tuple[ClusteredMatrix, Mapping[str, float]] | None:
        """A finished tensor with all hashes checked; None if it is missing or damaged (it is then made again)."""
        path = self._file(number)
        if path.is_symlink() or not path.is_file():
            return None
        try:
            with open_file(path) as part:
                matrix = part.load(name)
                return (matrix, part.tensors[name].stats) if isinstance(matrix, ClusteredMatrix) else None
        except (CorruptError, NotRkfError, UsageError):
            return None

    def close(self, keep: bool = False) -> None:
        """Remove the folder unless `keep` is set, or it was never opened and may be another process's."""
        if not self._opened or keep:
            return
        try:
            self._remove()
        except KeyboardInterrupt:  # in its midst: nothing need be left
            self._remove()
            raise

    def _remove(self) -> None:
        try:
            try:
                self._empty()
            except OutputError:  # a file may be busy for a moment
                self._empty()
        except OutputError as error:
            raise OutputError(f"{self.path}: cannot be removed; nothing needs it now: remove it yourself") from error
        with suppress(OSError):
            self.path.rmdir()

    def _empty(self) -> None:
        """Remove single files: the user may own a folder of this name."""
        for path in [*self.path.glob(FINISHED), self.path / JOB, partial(self.path / JOB)]:
            with reporting(path):
                path.unlink(missing_ok=True)

    def _found_job(self) -> dict[str, Any] | None:
        """The job whose finished tensors are here; None if there are none, {} if the job is unknown."""
        if not any(self.path.glob(FINISHED)):
            return None
        try:
            return kept_json.opened(_KIND, read_private(self.path / JOB, _MOST) or b"")
        except ValueError:
            return {}

    def _file(self, number: int) -> Path:
        return self.path / f"{number:06}.rkf"
