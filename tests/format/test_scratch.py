"""Temporary folders: a signal during their removal."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rkf.file.scratch import scratch


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C counts, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("event", ["os.remove", "os.rmdir"])
def test_a_signal_while_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str) -> None:
    """Ctrl-C at the removal of a file or of the folder itself left the rest of it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    waiting = [event]

    def interrupt(name: str, arguments: tuple[object, ...]) -> None:
        if name in waiting:
            waiting.clear()
            os.kill(os.getpid(), signal.SIGINT)

    sys.addaudithook(interrupt)  # stays for good, and does nothing once it has done this
    with pytest.raises(KeyboardInterrupt), scratch() as folder:
        (folder / "a file").touch()
    assert not waiting and not folder.exists()
