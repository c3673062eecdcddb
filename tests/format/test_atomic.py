"""Faults while a file is written: the old file intact or the new one complete, a clear message, no leftovers."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import portalocker
import pytest

import rkf
from rkf.errors import OutputError, RkfError, UsageError
from rkf.file.archive import pack
from rkf.file.atomic import refuse_same_file, replacing
from rkf.file.edit import edit
from tests.format import build

CALLS = ("write", "fsync", "replace", "truncate", "lseek", "copy_file_range", "pread")


class Faults:
    """Counts the system calls that reach the disk, and makes the k-th of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: tuple[str, ...] = CALLS) -> None:
        self.count, self.fail_at, self.error = 0, 0, errno.ENOSPC
        for name in calls:
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, call: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.fail_at:
                raise OSError(self.error, os.strerror(self.error))
            return call(*arguments, **options)

        return wrapper


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def whole(path: Path) -> bytes:
    """The bytes of a file, after opening it as a check."""
    rkf.open(path).close()
    return path.read_bytes()


def test_the_kth_call_fails(tmp_path: Path, faults: Faults) -> None:
    path = build.write_model(tmp_path / "m.rkf", seed=1)
    old, faults.count = path.read_bytes(), 0
    build.write_model(path, seed=2, force=True)
    new, calls = path.read_bytes(), faults.count
    assert calls > 40
    for faults.error in (errno.ENOSPC, errno.EIO):
        for fail_at in range(1, calls + 1):
            path.write_bytes(old)
            faults.count, faults.fail_at = 0, fail_at
            with pytest.raises(OutputError, match=r"m\.rkf: cannot be written"):
                build.write_model(path, seed=2, force=True)
            faults.fail_at = 0
            assert whole(path) in (old, new)
            assert whole(path) == old or fail_at == calls  # only the fsync of the folder comes after the rename
            assert names(tmp_path) == ["m.rkf"]


def test_the_kth_call_of_an_edit_fails(tmp_path: Path, faults: Faults) -> None:
    path = build.write_model(tmp_path / "m.rkf")
    old, faults.count = path.read_bytes(), 0
    edit(path, provenance={"note": "new"})
    new, calls = path.read_bytes(), faults.count
    for fail_at in range(1, calls + 1):
        path.write_bytes(old)
        faults.count, faults.fail_at = 0, fail_at
        try:
            edit(path, provenance={"note": "new"})
        except OutputError as error:
            assert "cannot be written" in str(error)
        faults.fail_at = 0
        assert whole(path) in (old, new)
        assert names(tmp_path) == ["m.rkf"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = build.write_model(tmp_path / "a.rkf").read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:7])))
    assert build.write_model(tmp_path / "b.rkf").read_bytes() == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RkfError])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def broken() -> Iterator[None]:
        with replacing(tmp_path / "out") as file:
            file.write(b"begun")
            yield

    with pytest.raises(error):
        next(generator := broken())
        generator.throw(error("stop"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_refused_and_forced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(UsageError, match="--force"), replacing(path):
        pass
    assert path.read_bytes() == b"old"
    with replacing(path, force=True) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["out"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with replacing(tmp_path / "link", force=True) as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("name", [".", "folder", "missing/out", "x" * 2000, "nul\0byte", "/dev/null"])
def test_impossible_targets_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises((UsageError, OutputError)), replacing(tmp_path / name, force=True):
        pass
    assert names(tmp_path) == ["folder"]


def test_odd_names_are_written(tmp_path: Path) -> None:
    for name in ("a b.rkf", "é😀.rkf", "-x", "x" * 240, "%s{}", "line\nbreak"):
        whole(build.write_model(tmp_path / name))


def test_a_second_writer_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with replacing(path) as file:
        file.write(b"first")
        with pytest.raises(OutputError, match="another process is writing"), replacing(path, force=True):
            pass
        file.write(b" whole")
    assert path.read_bytes() == b"first whole"


def test_what_a_killed_writer_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").write_bytes(b"rubbish that is longer")
    with replacing(tmp_path / "out") as file:
        file.write(b"whole")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"whole"


def test_a_name_that_goes_before_it_is_locked_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, finished = portalocker.lock, []

    def late(descriptor: int, flags: portalocker.LockFlags) -> None:
        if not finished:
            finished.append((tmp_path / ".out.partial").rename(tmp_path / "out"))  # its first owner is done
        lock(descriptor, flags)

    (tmp_path / ".out.partial").write_bytes(b"first")
    monkeypatch.setattr(portalocker, "lock", late)
    with replacing(tmp_path / "out", force=True) as file:
        file.write(b"second")
        assert (tmp_path / "out").read_bytes() == b"first"
    assert (tmp_path / "out").read_bytes() == b"second"


@pytest.mark.parametrize(("error", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_folders_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, fails: bool
) -> None:
    fsync = os.fsync

    def fussy(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fussy)
    with pytest.raises(OutputError) if fails else nullcontext(), replacing(tmp_path / "out") as file:
        file.write(b"whole")
    assert (tmp_path / "out").read_bytes() == b"whole"


def test_many_writers_leave_one_whole_file(tmp_path: Path) -> None:
    path, done, refused = tmp_path / "out", [], []

    def write(number: int) -> None:
        for _ in range(30):
            try:
                with replacing(path, force=True) as file:
                    for _ in range(20):
                        file.write(b"%d" % number)
                done.append(number)
            except OutputError:
                refused.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) + len(refused) == 120
    assert path.read_bytes() in {b"%d" % number * 20 for number in range(4)}
    assert names(tmp_path) == ["out"]


def test_the_output_is_not_the_input(tmp_path: Path) -> None:
    path = build.write_model(tmp_path / "m.rkf")
    (tmp_path / "link").symlink_to("m.rkf")
    for output in (path, tmp_path / "." / "m.rkf", tmp_path / "link"):
        with pytest.raises(OutputError, match="the output is the input"):
            pack(path, output, force=True)
    refuse_same_file(tmp_path / "other", path)


def test_a_mapped_file_can_be_replaced(tmp_path: Path) -> None:
    path = build.write_model(tmp_path / "m.rkf", seed=1)
    with rkf.open(path) as container:
        before = container.decode("model.embed_tokens.weight")
        build.write_model(path, seed=2, force=True)
        assert (container.decode("model.embed_tokens.weight") == before).all()
    with rkf.open(path) as container:
        assert (container.decode("model.embed_tokens.weight") != before).any()


KILLED = """
import os, signal, sys
from pathlib import Path
import portalocker  # looks for the temporary folder when it is imported, which is a write
from tests.format import build
left = int(sys.argv[2])
def wrapped(call):
    def wrapper(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return wrapper
for name in ("write", "fsync", "replace"):
    setattr(os, name, wrapped(getattr(os, name)))
build.write_model(Path(sys.argv[1]), seed=2, force=True)
"""


def test_a_writer_is_killed(tmp_path: Path) -> None:
    path = build.write_model(tmp_path / "m.rkf", seed=1)
    old = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        counted = Faults(patch, ("write", "fsync", "replace"))
        new = build.write_model(tmp_path / "new.rkf", seed=2).read_bytes()
    (tmp_path / "new.rkf").unlink()
    # The last calls are the superblock's write, the file's fsync, the rename, the folder's fsync.
    for point in (0, 1, counted.count // 2, *range(counted.count - 4, counted.count)):
        command = [sys.executable, "-c", KILLED, str(path), str(point)]
        killed = subprocess.run(command, check=False, cwd=Path(__file__).parents[2])
        assert killed.returncode == -signal.SIGKILL
        assert whole(path) == (new if point == counted.count - 1 else old)
        assert set(names(tmp_path)) <= {"m.rkf", ".m.rkf.partial"}
    build.write_model(path, seed=1, force=True)
    assert names(tmp_path) == ["m.rkf"]
    assert whole(path) == old


def test_eight_readers_while_versions_are_renamed_in(tmp_path: Path) -> None:
    path = build.write_model(tmp_path / "m.rkf")
    stop, read, failures = threading.Event(), [0] * 8, []
    identities = set()

    def reader(number: int) -> None:
        while not stop.is_set():
            try:
                with rkf.open(path) as container:
                    identities.add(container.ranks_id)
                    for name in container.tensors:
                        container.decode(name)
                read[number] += 1
            except BaseException as error:  # noqa: BLE001  (any failure of a reader is the finding)
                failures.append(error)

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    while (min(read) < 5 or len(identities) < 2) and not failures:
        for seed in range(4):
            build.write_model(path, seed=seed, force=True)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
