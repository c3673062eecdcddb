"""Worker threads that run the step kernel beside the caller. Knows addresses and calls, nothing of models.

Between calls a worker spins briefly, then yields the core, then parks in Python. So an idle model uses no CPU, and a
busy one has no thread to wake. No call waits for a worker: threads claim phases (kernels/sync.py), and the caller can
finish all of them alone.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.errors import UsageError
from rkf.format.codec import workers
from rkf.runtime.structs import CALL, CLOSED, THREAD, WORKER

ENTRY = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)


def available() -> int:
    """The number of threads that this process may keep busy: its affinity, limited by the control group's quota."""
    quota = _quota(Path("/sys/fs/cgroup"))
    return workers() if quota is None else max(min(workers(), int(quota)), 1)


def _quota(root: Path) -> float | None:
    """CPUs granted by the control group (version 2, then 1); None if there is no limit."""
    try:
        granted, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            granted = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return int(granted) / int(period) if granted.isdigit() else None


def chosen(threads: int | None) -> int:
    """The number of threads to run: the requested number, at most those available; None means all of them."""
    if threads is not None and threads < 1:
        raise UsageError(f"threads: expected at least 1, got {threads}")
    return min(threads or available(), available())


class Pool:
    """The caller and threads - 1 workers. `addresses` has the kernels step, serve and publish; phases: the most that a
    call has; `keep` lives as long as a worker may read it.
    """

    def __init__(
        self, addresses: dict[str, int], plan: int, batch: int, threads: NDArray[Any], phases: int, keep: object
    ) -> None:
        self._step, self._publish = ENTRY(addresses["step"]), ENTRY(addresses["publish"])
        self._call = np.zeros(1, CALL)
        self._call["source"] = batch
        self._phases = phases
        self._workers = np.zeros(len(threads), WORKER)
        self._wake = self._workers["wake"]
        # Addresses are looked up once: numpy takes 1.5 us for each, and a token of a small model takes 500.
        self._published = (self._call.ctypes.data, self._workers[1:].ctypes.data, len(threads) - 1)
        self._passed = (plan, batch, threads.ctypes.data)
        self._held = (self._call, self._workers, threads, keep)
        self._locks = [threading.Lock() for _ in threads]
        self._tag = 1  # of the next call's first phase, which is also the call's number
        serve = ENTRY(addresses["serve"])
        for index in range(1, len(threads)):
            worker = self._workers[index : index + 1]
            worker["call"], worker["step"] = self._call.ctypes.data, addresses["step"]
            worker["plan"], worker["thread"] = plan, threads.ctypes.data + index * THREAD.itemsize
            self._locks[index].acquire()
            arguments = (serve, worker, self._locks[index], self._held)
            threading.Thread(target=_work, args=arguments, name=f"rkf-{index}", daemon=True).start()
        weakref.finalize(self, _close, self._call, self._locks[1:])

    def run(self) -> None:
        """One call of the step kernel on all threads; returns when the last phase is done."""
        call, workers, count = self._published
        tag = self._tag
        self._tag += self._phases
        try:
            if count:
                self._publish(call, tag, workers, count)
                if self._wake.any():
                    self._wake_parked()
        finally:  # after Ctrl-C, workers must not go on with a call whose arrays are freed when it unwinds
            self._step(*self._passed, tag)

    def _wake_parked(self) -> None:
        for index in np.flatnonzero(self._wake):
            self._wake[index] = 0
            self._locks[index].release()


def _work(serve: Any, worker: NDArray[Any], lock: threading.Lock, held: tuple[Any, ...]) -> None:
    """The loop of a worker: serve until idle, park until woken. `held` keeps alive what the kernels read."""
    call = held[0]
    while call["number"][0] != CLOSED:
        serve(worker.ctypes.data, 0, 0, 0)
        lock.acquire()


def _close(call: NDArray[Any], locks: list[threading.Lock]) -> None:
    call["number"][0] = CLOSED
    for lock in locks:
        if lock.locked():
            lock.release()
