"""Runs commands of which a chosen step fails, or at which the process is killed or told to end.

A step is whatever changes the disk: a file opened for writing, a write, fsync, truncation, rename, removal, a new
folder. Every run is a fork of one process that has imported what the command imports, so a run costs the command alone.

    python -m tests.faults                 # every step of every command in every way
    python -m tests.faults convert pack    # of some
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from rkf.cli import cli, main

WAYS = ("fails", "is killed", "is told to end")
_PATCHED = ("write", "fsync", "copy_file_range")
_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
_DEVICES = (os.devnull, "/dev/tty")
_LIMIT_S, _NO_END = 900, 124  # of a run: wall time, since other jobs may stop it for minutes; its code then


@dataclass(frozen=True)
class Scenario:
    """A command and what it writes.

    prepare: makes the inputs and the old output in a folder. valid: whether an output that is neither byte for byte
    the old nor the new one is complete all the same. kept: beginnings of names that may stay after an error, from which
    the next run goes on. once: the command refuses to replace its output. spare: the command may do without its output.
    noisy: libraries tell their progress on stderr, before what the command tells.
    """

    name: str
    command: Sequence[str] | Callable[[], object]
    output: str
    prepare: Callable[[Path], object]
    valid: Callable[[Path], bool] = lambda folder: False
    kept: tuple[str, ...] = ()
    once: bool = False
    spare: bool = False
    noisy: bool = False


@dataclass(frozen=True)
class Run:
    """code: the exit code, negative for a signal; steps: how many there were; told: stderr; imported: modules."""

    code: int
    steps: int
    told: str
    imported: tuple[str, ...]


class _Faults:
    """Counts steps, and lets the k-th of them go wrong (0: none)."""

    def __init__(self, at: int, way: str) -> None:
        self._at, self._way, self.count, self._on = at, way, 0, True
        for name in _PATCHED:
            setattr(os, name, self._patched(getattr(os, name)))
        sys.addaudithook(self._watch)

    def _patched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(descriptor: int, *rest: Any) -> Any:
            if descriptor > 2:
                self._step()
            return call(descriptor, *rest)

        return step

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in _EVENTS or (writes and arguments[0] not in _DEVICES):
            self._step()

    def _step(self) -> None:
        if not self._on:
            return
        self.count += 1
        if self.count != self._at:
            return
        if self._way == "fails":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGKILL if self._way == "is killed" else signal.SIGTERM)

    def stop(self) -> None:
        self._on = False


def run(command: Sequence[str] | Callable[[], object], folder: Path, at: int = 0, way: str = "") -> Run:
    """`rkf COMMAND`, or a call, in `folder`, whose temporary files are there too; its step `at` goes wrong."""
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as counted:
        child = os.fork()
        if child == 0:
            _child(command, folder, at, way, told.fileno(), counted.fileno())
        code = _ended(child)
        told.seek(0), counted.seek(0)
        steps, *imported = counted.read().decode().split() or ["0"]
        return Run(code, int(steps), told.read().decode(), tuple(imported))


def _ended(child: int) -> int:
    """The exit code of a process, negative for a signal. Not by an alarm in there: `rkf` takes that signal itself."""
    end = time.monotonic() + _LIMIT_S
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return _NO_END
        time.sleep(0.005)


def _child(
    command: Sequence[str] | Callable[[], object], folder: Path, at: int, way: str, told: int, counted: int
) -> None:
    code = 70
    try:
        os.chdir(folder)
        tempfile.tempdir = str(folder / "tmp")
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(told, 2)
        if callable(command):
            verb = click.command("call")(command)
            cli.add_command(verb)
            command = ["call"]
        sys.argv = ["rkf", *command]
        weakref.finalize._registry.clear()  # what the parent will remove
        before = set(sys.modules)
        faults = _Faults(at, way)
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        faults.stop()
        weakref.finalize._exitfunc()  # as the end of an interpreter does
        os.pwrite(counted, " ".join([str(faults.count), *sorted(sys.modules.keys() - before)]).encode(), 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder, by its path in it. Locks of scratch folders stay."""
    found = sorted(path for path in folder.rglob("*") if "tmp" not in path.relative_to(folder).parts)
    litter = [path for path in (folder / "tmp").glob("rkf-*/*") if path.is_dir()]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in [*found, *litter]}


def broken_promises(scenario: Scenario, work: Path, most: int | None = None) -> Iterator[str]:
    """What goes wrong when steps of a scenario go wrong: at most so many of its steps in each way, spread evenly."""

    def anew() -> None:
        shutil.rmtree(work, ignore_errors=True)
        (work / "tmp").mkdir(parents=True)
        scenario.prepare(work)

    anew()
    for name in run(scenario.command, work).imported:
        with suppress(ImportError):  # some are made by others, and cannot be imported
            import_module(name)
    anew()
    before = contents(work)
    sound = run(scenario.command, work)
    if sound.code:
        yield f"{scenario.name}: exit code {sound.code}: {sound.told}"
        return
    after = contents(work)
    steps = range(1, sound.steps + 1)
    if most is not None and most < len(steps):
        steps = sorted({round(1 + n * (len(steps) - 1) / (most - 1)) for n in range(most)})
    print(f"{scenario.name}: {len(steps)} of {sound.steps} steps", file=sys.stderr, flush=True)
    for at in steps:
        for way in WAYS:
            anew()
            seen = run(scenario.command, work, at, way)
            where = f"{scenario.name}: step {at} of {sound.steps} {way}: "
            if seen.code == _NO_END:
                yield f"{where}no end after {_LIMIT_S} s"
            if way == "fails" and not (seen.code == 0 or _is_one_line(seen.told, scenario.noisy)):
                yield f"{where}exit code {seen.code}: {seen.told[-1000:]}"
            if way == "is told to end" and seen.code not in (0, 130):
                yield f"{where}exit code {seen.code}: {seen.told[-1000:]}"
            found = contents(work)
            output = _of(found, scenario.output)
            if output not in (_of(before, scenario.output), _of(after, scenario.output)) and not scenario.valid(work):
                yield f"{where}{scenario.output} is neither the old nor the new one"
            if seen.code == 0 and output == _of(before, scenario.output) and not scenario.spare:
                yield f"{where}exit code 0, but {scenario.output} is the old one"
            litter = {
                name for name in found.keys() - before.keys() - after.keys() if not name.startswith(scenario.kept)
            }
            if way != "is killed" and seen.code and litter:
                yield f"{where}left behind {litter}"
            if scenario.once and output != _of(before, scenario.output):
                continue  # the output is there, and the command would refuse to make it again
            again = run(scenario.command, work)
            if again.code or contents(work).keys() != after.keys():
                left = sorted(contents(work).keys() ^ after.keys())
                yield f"{where}the next run: exit code {again.code}, {again.told[-1000:]} differs in {left}"


def _of(found: dict[str, bytes], output: str) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if name == output or name.startswith(f"{output}/")}


def _is_one_line(told: str, noisy: bool) -> bool:
    if noisy and "Traceback" not in told:
        told = told.splitlines(keepends=True)[-1]
    return told.startswith("rkf: ") and told.count("\n") == 1
