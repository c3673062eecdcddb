"""Atheris sees the branches of the readers, also of those that are imported where they are first used."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("atheris") is None, reason="needs the extra fuzz")
def test_readers_are_instrumented():
    command = [sys.executable, "-m", "tests.fuzz", "gguf", "--minutes", "0.02"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    for reader in ("rkf.converters.gguf", "rkf.converters.gguf_header", "rkf.converters.gguf_tokenizer"):
        assert f"INFO: Instrumenting {reader}\n" in done.stderr
