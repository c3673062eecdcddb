"""The Triton kernels, in a process of their own: Triton must know before its first import that it is to interpret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux alone")
ROOT = Path(__file__).parents[2]


def test_products_of_the_kernels():
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/torch/fused_products.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | interpret, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
