"""Threads change no bit of the result, however they are scheduled, and end with their backend."""

import gc
import os
import threading
import time

import numpy as np
import pytest

import rkf
from rkf.cluster.recipe import Rule
from rkf.errors import UsageError
from rkf.runtime import threads
from rkf.runtime.backend import Row
from rkf.runtime.cpu import CpuBackend
from tests.runtime import tiny
from tests.runtime.files import write_model

CONFIG = tiny.config()
IDS = np.random.Generator(np.random.Philox(key=3)).integers(0, 400, 100)
RULE = Rule(k=16, grid=True, affine="row", exceptions=0.002)


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    path = write_model(tmp_path_factory.mktemp("threads") / "m.rkf", CONFIG, tiny.weights(CONFIG), RULE)
    with rkf.open(path) as opened:
        yield opened


def logits(backend):
    """A prompt in tiles, then token by token."""
    sequence = backend.new_sequence(256)
    parts = [IDS[:40], *np.split(IDS[40:], 60)]
    return np.concatenate([backend.forward([Row(sequence, part)], "all") for part in parts])


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("rkf-")]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(container, monkeypatch, count):
    wanted = logits(CpuBackend(container, threads=1))
    monkeypatch.setattr(threads, "available", lambda: count)  # more threads than cores: they are preempted all the time
    backend = CpuBackend(container, threads=count)
    assert len(workers()) == count - 1
    for _ in range(5):
        assert np.array_equal(logits(backend), wanted)


def windows(backend, lengths):
    """A call of each length, with all logits or the last ones, in a sequence that starts again when it is full."""
    sequence, found = backend.new_sequence(256), []
    for length in lengths:
        sequence.truncate(sequence.length if sequence.length + length <= 256 else 0)
        found.append(backend.forward([Row(sequence, IDS[:length])], "last" if length % 2 else "all"))
    return np.concatenate(found)


def test_a_late_worker_does_no_harm(container, monkeypatch):
    """Calls of one token and of many in turn: one who comes late to a call must not take the sizes of the next."""
    lengths = np.random.Generator(np.random.Philox(key=5)).choice([1, 1, 1, 2, 5, 17, 60], 400)
    wanted = windows(CpuBackend(container, threads=1), lengths)
    monkeypatch.setattr(threads, "available", lambda: 8)
    assert np.array_equal(windows(CpuBackend(container, threads=8), lengths), wanted)


def test_busy_neighbours_do_no_harm(container, monkeypatch):
    """Python threads that never rest, two backends that take the cores from each other, workers that come and go."""
    lengths = np.random.Generator(np.random.Philox(key=6)).choice([1, 1, 2, 3, 33, 64], 100)
    wanted = windows(CpuBackend(container, threads=1), lengths)
    monkeypatch.setattr(threads, "available", lambda: 6)
    done, found = threading.Event(), []

    def spin():
        while not done.is_set():
            sum(range(1000))

    def call():
        found.extend(windows(CpuBackend(container, threads=6), lengths) for _ in range(3))

    neighbours = [threading.Thread(target=spin) for _ in range(2)]
    callers = [threading.Thread(target=call) for _ in range(2)]
    for thread in (*neighbours, *callers):
        thread.start()
    for caller in callers:
        caller.join()
    done.set()
    for neighbour in neighbours:
        neighbour.join()
    assert len(found) == 6 and all(np.array_equal(item, wanted) for item in found)


def test_parked_workers_wake(container, monkeypatch):
    monkeypatch.setattr(threads, "available", lambda: 2)
    backend = CpuBackend(container, threads=2)
    wanted = logits(backend)
    for _ in range(3):
        time.sleep(0.1)  # longer than an idle worker spins
        assert np.array_equal(logits(backend), wanted)


def test_workers_end_with_their_backend(container, monkeypatch):
    monkeypatch.setattr(threads, "available", lambda: 3)
    gc.collect()
    before = len(workers())
    backend = CpuBackend(container, threads=3)
    logits(backend)
    del backend
    gc.collect()
    deadline = time.monotonic() + 5
    while len(workers()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(workers()) == before


def test_two_callers_take_turns(container):
    backend = CpuBackend(container)
    wanted = logits(backend)
    found = []
    callers = [threading.Thread(target=lambda: found.append(logits(backend))) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(np.array_equal(item, wanted) for item in found) and len(found) == 2


def test_threads_are_bounded_by_affinity_and_quota(tmp_path):
    assert 1 <= threads.available() <= (os.cpu_count() or 1)
    assert threads.chosen(10_000) == threads.available()
    with pytest.raises(UsageError):
        threads.chosen(0)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert threads._quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads._quota(tmp_path) is None
