"""Threads that leave their work soon after an error or Ctrl-C. Knows no task."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


class WorkerThreads(ThreadPoolExecutor):
    """A pool of threads for a `with` block, which waits for all tasks. If an exception leaves the block, queued tasks
    are dropped and running ones end at their next step of Python: they may take minutes, for results nobody wants.
    """

    def __init__(self, threads: int, name: str = "") -> None:
        super().__init__(threads, name)
        self._running: set[int] = set()
        self._alone = threading.Lock()

    def submit(self, task: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_R]:
        return super().submit(partial(self._noted, partial(task, *args, **kwargs)))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        if kind is not None:
            self.shutdown(wait=False, cancel_futures=True)
            with self._alone:
                for thread in self._running:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Unwanted))
        return super().__exit__(kind, error, trace)

    def _noted(self, task: Callable[[], _R]) -> _R:
        """The task's result. The thread counts as running meanwhile: an idle one must not be interrupted."""
        thread = threading.get_ident()
        with self._alone:
            self._running.add(thread)
        try:
            return task()
        finally:
            with self._alone:
                self._running.discard(thread)


class _Unwanted(BaseException):
    """Raised within a task. No Exception: work that goes on after an error must end too."""
