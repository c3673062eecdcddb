"""A few steps of every command that writes go wrong. `python -m tests.faults` tries all of them."""

import subprocess
import sys
from pathlib import Path

import pytest

QUICK = ["convert", "resume", "calibrate", "pack", "unpack", "gguf", "hf", "values", "fold", "edit", "kld"]


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="runs are forks")
@pytest.mark.parametrize("names", [QUICK, ["tune"], ["study"]], ids=["core", "tune", "study"])
def test_outputs_are_old_or_new(names):
    command = [sys.executable, "-m", "tests.faults", *names, "--most", "4"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=900)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
