"""Processes that render chat templates (template_worker.py), kept for the next render: starting one takes 80 ms.

Each has loaded Jinja and forks a child for every request, so a request still has limits and memory of its own.
"""

from __future__ import annotations

import atexit
import os
import selectors
import signal
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import NamedTuple

_WORKER = Path(__file__).with_name("template_worker.py")
_MOST = 4  # workers; a template that takes long then holds up a few others alone
_PATIENCE_S = 0.1  # for a worker to be free: a render takes 3 ms
_HEAD = struct.Struct("<iQ")  # exit code (negative: a signal), bytes of output


class Rendered(NamedTuple):
    """The end of one request. code: the child's exit code, negative for a signal; output: its text or message."""

    code: int
    output: bytes


class _Worker:
    """One process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # so that its child can be killed with it, and Ctrl-C is ours alone
        )
        self.pid = os.getpid()

    def run(self, template: bytes, request: bytes, seconds: float) -> Rendered:
        """Raises TimeoutError; EOFError if the process is gone."""
        process, ends = self._process, monotonic() + seconds
        if process.stdin is None or process.stdout is None:
            raise EOFError
        try:
            for part in (template, request):
                process.stdin.write(len(part).to_bytes(8, "little") + part)
            process.stdin.flush()
        except BrokenPipeError:
            raise EOFError from None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            found = bytearray()
            while len(found) < _HEAD.size or len(found) < _HEAD.size + _HEAD.unpack_from(found)[1]:
                if not selector.select(max(ends - monotonic(), 0)):
                    raise TimeoutError
                if not (part := os.read(process.stdout.fileno(), 1 << 20)):
                    raise EOFError
                found += part
        return Rendered(_HEAD.unpack_from(found)[0], bytes(found[_HEAD.size :]))

    def close(self) -> None:
        """End the process and its child."""
        if self.pid == os.getpid():
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


class TemplatePool:
    """Workers that threads share. A thread waits a little for one before it starts another."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._started = 0
        self._changed = threading.Condition()
        atexit.register(self.close)

    def run(self, template: bytes, request: bytes, seconds: float) -> Rendered:
        """Render in a process of its own. Raises TimeoutError after so many seconds."""
        worker = self._taken()
        try:
            done = worker.run(template, request, seconds)
        except BaseException as error:
            self._end(worker)
            if isinstance(error, EOFError):
                return Rendered(-signal.SIGKILL, b"")
            raise
        with self._changed:
            self._idle.append(worker)
            self._changed.notify()
        return done

    def close(self) -> None:
        """End the workers that no thread uses."""
        with self._changed:
            idle, self._idle = self._idle, []
        for worker in idle:
            self._end(worker)

    def _taken(self) -> _Worker:
        with self._changed:
            mine = [worker for worker in self._idle if worker.pid == os.getpid()]  # not those of a fork's parent
            self._started -= len(self._idle) - len(mine)
            self._idle = mine
            while not self._idle and self._started:
                if not self._changed.wait(_PATIENCE_S) and self._started < _MOST:
                    break
            if self._idle:
                return self._idle.pop()
            self._started += 1
        try:
            return _Worker()
        except BaseException:
            with self._changed:
                self._started -= 1
            raise

    def _end(self, worker: _Worker) -> None:
        worker.close()
        with self._changed:
            self._started -= 1
            self._changed.notify()
