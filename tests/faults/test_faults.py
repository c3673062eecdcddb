"""A few steps of the commands that start quickly go wrong. `python -m tests.faults` tries all steps of all commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = ["pack", "unpack", "split", "join", "gguf", "hf", "values", "fold", "edit", "chat", "history"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks")
def test_outputs_are_old_or_new():
    command = [sys.executable, "-m", "tests.faults", *QUICK, "--most", "3"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=900
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
