"""The Triton kernels, in a separate process: Triton must know before its first import whether to interpret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is published for Linux alone")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rkf.torch import fused, triton_kernels  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_products_of_the_kernels():
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/torch/fused_products.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | interpret, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name,blocks", [("matvec", fused._MATVEC), ("matmul", {"BLOCK_T": 16, **fused._MATMUL})])
def test_kernels_compile_for_a_gpu(name, blocks):
    """The compiler refuses code that the interpreter accepts. No GPU is needed to compile for one."""
    kernel = getattr(triton_kernels, name)
    fixed = {"W0": 4, "W1": 1, "W2": 0, "HAS_A": True, "HAS_B": True, "HAS_BIAS": True, **blocks}
    floats, words = dict.fromkeys(("tables", "a", "b", "deltas"), "*fp32"), {"plane0": "*i32", "plane1": "*u8"}
    kinds = {"x": "*bf16", "y": "*bf16", "bias": "*bf16", "starts": "*i32", "columns_of": "*i32", "plane2": "*fp32"}
    kinds |= floats | words | dict.fromkeys(fixed, "constexpr")
    signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(key),): value for key, value in fixed.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
    assert made.metadata.shared < 100_000  # the limit of consumer GPUs
    assert made.asm["cubin"]
