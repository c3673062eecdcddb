"""What rkf does on a GPU, compared with the exact path of the CPU: `make gpu`, or `python -m benchmarks.gpu MODEL.rkf`.

Runs the Triton kernels, the torch decoder, its CUDA graph, the folder for transformers, tuning and the passes of a
calibration, and prints a line for each with its figures; the last line is everything as JSON. Without a GPU the kernels
run under Triton's interpreter, the rest on the CPU in f32, and what needs a GPU is skipped by name. Ends with an error
if a path is further from the exact one than its bound.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rkf.bridges.transformers_export import export_transformers
from rkf.calibrate.calibration import SHORT
from rkf.calibrate.devices import Cpu, Device
from rkf.calibrate.divergences import PIECE
from rkf.calibrate.passes import TensorReader
from rkf.calibrate.torch_passes import TorchDevice
from rkf.cluster.allocation import coarse
from rkf.errors import UsageError
from rkf.file.container import open_file
from rkf.model.program import Program
from rkf.runtime.backend import F32, Backend, Row
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.torch_backend import TorchBackend
from rkf.runtime.torch_graph import has_fixed_shapes
from rkf.text.tokenizer import open_tokenizer
from rkf.tune import tune

ROOT = Path(__file__).parents[1]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
REACH = 0.05 if GPU else 1e-3  # of the largest logit: bf16 has 8 bits, and sums of the CPU differ in order alone
REACH_OF_CALIBRATION = 0.1  # numpy's own passes have eight-bit matrices
PROMPT, STEPS = (512, 128) if GPU else (24, 4)  # tokens
Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    path = parser.parse_args().model
    found: Figures = {"device": torch.cuda.get_device_name() if GPU else "none: the CPU and Triton's interpreter"}
    print(f"device: {found['device']}", flush=True)
    for name, part in PARTS.items():
        found[name] = part(path)
        print(f"{name}: {found[name]}", flush=True)
    print(json.dumps(found))
    reach = {"calibration": REACH_OF_CALIBRATION}
    measured = {
        name: figures["off"] for name, figures in found.items() if isinstance(figures, dict) and "off" in figures
    }
    far = [name for name, off in measured.items() if off > reach.get(name, REACH)]
    if far:
        raise SystemExit(f"further from the exact path than allowed: {', '.join(far)}")


def kernels(path: Path) -> Figures | str:
    """Products of the Triton kernels against the decoded matrices (tests/torch/fused_products.py)."""
    if find_spec("triton") is None:
        return "skipped: Triton is not installed"
    interpret = {} if GPU else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/torch/fused_products.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | interpret, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-4000:])
    return {"tests": done.stdout.strip().splitlines()[-1].strip("= ")}


def decoder(path: Path) -> Figures:
    """Logits and speed of the torch decoder, with the fused kernels on a GPU."""
    with open_file(path) as container:
        exact, found = CpuBackend(container, exact=True), TorchBackend(container, DEVICE)
        return {**difference(logits(found), logits(exact)), **speed(found)}


def graph(path: Path) -> Figures | str:
    """A token's CUDA graph, which is compared with the decoder when it is captured."""
    if not GPU:
        return "skipped: CUDA graphs need a GPU"
    with open_file(path) as container:
        if container.model is None or not has_fixed_shapes(container.model.program):
            return "skipped: experts and states are not captured"
        backend = TorchBackend(container, DEVICE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the backend warns where it goes on without a graph
            return speed(backend)


def transformers(path: Path) -> Figures:
    """The folder of `rkf export transformers`, loaded by transformers."""
    from transformers import AutoModelForCausalLM

    import rkf.bridges.transformers  # noqa: F401 - registers the quantizer

    with TemporaryDirectory() as folder, open_file(path) as container:
        exact = CpuBackend(container, exact=True)
        export_transformers(path, Path(folder) / "model")
        dtype = torch.bfloat16 if GPU else torch.float32
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype).to(DEVICE).eval()
        with torch.no_grad():
            found = model(torch.from_numpy(ids(exact))[None].to(DEVICE)).logits[0].float().cpu().numpy()
        return difference(found, logits(exact))


def tuning(path: Path) -> Figures | str:
    """A minute of `rkf tune` towards the model itself: the text, its gradients, what it holds on to."""
    if not GPU:
        return "skipped: generating its text takes minutes on a CPU; tests/tune runs all of it"
    with TemporaryDirectory() as folder:
        return tune(path, path, Path(folder) / "values.rkv", minutes=1, device=DEVICE)


def calibration(path: Path) -> Figures:
    """The passes of a calibration on rkf's short text, and those in numpy, which round matrices to eight bits.

    off: the largest difference of second moments, by their norm. losses_off: the median factor between losses of a
    matrix. Seconds: here, and in numpy.
    """
    with open_file(path) as container:
        if container.model is None:
            raise UsageError(f"{path}: expected a whole model")
        program, reader = container.model.program, TensorReader(container.decode)
        words = open_tokenizer(container).encode(SHORT.read_text("utf-8"))
        tokens = np.array(words[: len(words) // PIECE * PIECE], np.uint32).reshape(-1, PIECE)
        here, numpy = TorchDevice("cuda" if GPU else "cpu-torch"), Cpu()
        (moments, moments_s), (exact, exact_s) = (
            timed(partial(moments_of, each, program, reader, tokens)) for each in (here, numpy)
        )
        (losses, losses_s), (near, near_s) = (
            timed(partial(each.losses, program, reader, coarse, tokens)) for each in (here, numpy)
        )
        write = partial(here.write_text, program, reader, [[0]] * 128, folder=Path(), progress=None)
        _, text_s = timed(partial(write, ctx=PROMPT // 4))
    off = max(float(np.linalg.norm(each - exact[name]) / np.linalg.norm(exact[name])) for name, each in moments.items())
    factors = [abs(np.log(loss / near[name])) for name, loss in losses.items() if loss and near[name]]
    seconds = {"moments_s": (moments_s, exact_s), "losses_s": (losses_s, near_s), "text_s": text_s}
    return {"off": round(off, 4), "losses_off": round(float(np.exp(np.median(factors))), 4), **seconds}


def moments_of(device: Device, program: Program, reader: TensorReader, tokens: NDArray[np.uint32]) -> dict[str, F32]:
    """Those of all matrices outside stacks, by name."""
    found = list(device.moments(program, reader, tokens))
    return {name: each for layer in found for name, each in layer.items() if isinstance(each, np.ndarray)}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """(Its result, its seconds.)"""
    began = perf_counter()
    result = work()
    return result, round(perf_counter() - began, 2)


PARTS: dict[str, Callable[[Path], Figures | str]] = {
    "kernels": kernels,
    "decoder": decoder,
    "graph": graph,
    "transformers": transformers,
    "tuning": tuning,
    "calibration": calibration,
}


def ids(backend: Backend) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, backend.metadata.vocab_size, PROMPT)


def logits(backend: Backend) -> F32:
    return backend.forward([Row(backend.new_sequence(PROMPT), ids(backend))], "all")


def difference(found: F32, exact: F32) -> Figures:
    """off: the largest difference by the largest logit. same_choice: share of positions with the same best token."""
    off = float(np.abs(found - exact).max() / np.abs(exact).max())
    return {"off": round(off, 6), "same_choice": round(float((found.argmax(1) == exact.argmax(1)).mean()), 4)}


def speed(backend: Backend) -> Figures:
    """Tokens a second of one sequence, after a pass that compiles."""
    rates = {}
    for _ in range(2):
        sequence = backend.new_sequence(PROMPT + STEPS)
        began = perf_counter()
        backend.forward([Row(sequence, ids(backend))])
        read = perf_counter()
        for token in range(STEPS):
            backend.forward([Row(sequence, np.array([token]))])
        done = perf_counter()
        rates = {"prefill_tok_s": PROMPT / (read - began), "decode_tok_s": STEPS / (done - read)}
    return {name: float(f"{rate:.3g}") for name, rate in rates.items()}


if __name__ == "__main__":
    main()
