"""Tasks end soon after an error: nobody waits minutes for a result that nobody wants."""

import threading
import time

import pytest

from rkf.worker_threads import WorkerThreads

SOON_S = 20  # on a busy machine; the tasks would take for ever


def test_all_tasks_are_finished_at_the_end():
    with WorkerThreads(2) as pool:
        doubled = [pool.submit(lambda x: time.sleep(0.01) or 2 * x, number) for number in range(8)]
    assert [each.result(timeout=0) for each in doubled] == list(range(0, 16, 2))
    with pytest.raises(ZeroDivisionError), WorkerThreads(2) as pool:
        pool.submit(lambda: 1 / 0).result()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, GeneratorExit])
def test_an_error_ends_running_tasks_and_drops_queued_ones(error, capfd):
    begun, begins = [], threading.Event()

    def endless(number):
        begun.append(number)
        begins.set()
        try:
            while True:
                time.sleep(0.001)
        except Exception:  # noqa: BLE001  (a task that goes on after errors)
            pass

    began = time.monotonic()
    with pytest.raises(error), WorkerThreads(1) as pool:
        futures = [pool.submit(endless, number) for number in range(3)]
        begins.wait()
        raise error
    assert time.monotonic() - began < SOON_S
    assert begun == [0]
    assert futures[0].exception(timeout=0) is not None and all(each.cancelled() for each in futures[1:])
    assert capfd.readouterr() == ("", "")


def test_a_task_that_waits_for_another_pool_ends_too():
    begins = threading.Event()

    def endless():
        begins.set()
        while True:
            time.sleep(0.001)

    def nested():
        with WorkerThreads(2) as inner:
            list(inner.map(lambda _: time.sleep(0.05), range(10_000)))

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), WorkerThreads(2) as pool:
        pool.submit(nested), pool.submit(endless)
        begins.wait()
        raise KeyboardInterrupt
    assert time.monotonic() - began < SOON_S


def test_idle_threads_are_left_alone(capfd):
    for _ in range(200):
        with pytest.raises(KeyError), WorkerThreads(4) as pool:
            list(pool.map(abs, range(8)))
            pool.submit(abs, 1)
            raise KeyError
    assert capfd.readouterr() == ("", "")
