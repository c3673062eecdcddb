"""Signals, closed streams and files that vanish: one line, an exit code, and nothing left behind."""

import errno
import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from rkf.file.writer import Writer
from rkf.format.matrix import DenseTensor

# Runs a command; the first piece of work on the mapped file cuts it short.
CUT = """
import os, sys
from rkf.file import archive
compress = archive._compressed
def cut(job):
    os.truncate(sys.argv[2], 8192)
    return compress(job)
archive._compressed = cut
from rkf.cli import main
main()
"""
# Runs a command with some standard streams closed.
CLOSED = "import os, sys\nfor number in os.environ['CLOSED']: os.close(int(number))\nfrom rkf.cli import main\nmain()"
RKF = [sys.executable, "-m", "rkf"]


@pytest.fixture
def model(tmp_path):
    """A megabyte in one tensor."""
    path = tmp_path / "m.rkf"
    with Writer(path, metadata={}, provenance={}) as writer:
        writer.add("t", DenseTensor("f32", np.ones((512, 512), np.float32)))
    return path


def ran(*command, **options):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=120, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not cut mapped files")
def test_a_file_that_vanishes_is_one_line(model):
    done = ran(sys.executable, "-c", CUT, "pack", model, model.with_name("p.rkf"))
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"rkf: {model}: became shorter, or its disk failed, while it was open: restore it and start again\n"
    )
    assert [path.name for path in model.parent.iterdir()] == ["m.rkf"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_a_command(number, model):
    os.mkfifo(pipe := model.with_name("prompt"))
    command = [*RKF, "run", model, "--prompt-file", pipe]
    heed = partial(signal.signal, number, signal.SIG_DFL)  # tests that run in the background ignore some signals
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    with pipe.open("w"):  # returns when the command reads it
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert (process.returncode, said.strip()) == (130, "")


def test_output_that_cannot_be_written_is_one_line(model):
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run([*RKF, "info", model], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"rkf: stdout: {os.strerror(errno.ENOSPC)}\n")


def test_a_reader_that_has_gone_ends_it_quietly(model):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*RKF, "info", model], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("closed", ["0", "1", "2", "012"])
def test_no_file_takes_the_place_of_a_closed_stream(closed, model):
    """What is printed never ends in a file that is being written."""
    packed = model.with_name("p.rkf")
    done = ran(sys.executable, "-c", CLOSED, "pack", model, packed, env=os.environ | {"CLOSED": closed})
    assert done.returncode == 0
    assert ran(*RKF, "verify", packed).returncode == 0


def test_stdout_that_is_closed_is_one_line(model):
    done = ran(sys.executable, "-c", CLOSED, "info", model, env=os.environ | {"CLOSED": "1"})
    assert (done.returncode, done.stderr) == (1, f"rkf: stdout: {os.strerror(errno.EBADF)}\n")


def test_a_user_without_a_home_has_no_cache(model):
    bare = {key: value for key, value in os.environ.items() if key not in ("HOME", "RKF_CACHE", "XDG_CACHE_HOME")}
    code = "import os, pwd\npwd.getpwuid = lambda number: {}[number]\nfrom rkf.cli import main\nmain()"
    done = ran(sys.executable, "-c", code, "warmup", env=bare)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "rkf: there is no home folder for a cache: set RKF_CACHE to a folder\n"
