"""Tensor parallelism: two processes give the logits and the tokens of one, and each holds half of the weights."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import rkf
from rkf.cli import cli
from rkf.cluster.recipe import Rule
from rkf.converters.pipeline import convert
from rkf.errors import UnsupportedError, UsageError
from rkf.format.matrix import DenseTensor
from rkf.runtime.shares import Share
from rkf.runtime.torch_backend import TorchBackend
from tests.converters.test_adapted_file import logits
from tests.families.models import model_of, save, tokens
from tests.runtime import tiny
from tests.runtime.files import write_model
from tests.runtime.matrices import random_matrix

ROOT = Path(__file__).parents[2]
# Plain attention, windows and softcaps, a mixture, states, latent attention. docs/log.md has figures of others.
VARIANTS = ("llama", "gemma2", "qwen3_moe", "qwen3_5", "deepseek_v3")


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*launch, *command], capture_output=True, text=True, env=environment, timeout=300)


def test_two_processes_give_the_logits_of_one(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array(tokens()))
    paths = {variant: tmp_path / f"{variant}.rkf" for variant in VARIANTS}
    for variant, path in paths.items():
        convert(save(model_of(variant), tmp_path / variant), path, k=16)
    script = str(Path(__file__).with_name("parallel_logits.py"))
    done = torchrun(script, str(tmp_path / "ids.npy"), *map(str, paths.values()))
    assert done.returncode == 0, done.stderr[-3000:]
    for variant, path in paths.items():
        with rkf.open(path) as file:
            backend = TorchBackend(file)
            expected, found = logits(backend), np.load(path.with_suffix(".npy"))
            whole = sum(tensor.nbytes for tensor in backend._decoder.state_dict().values())
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max(), variant
        assert int(path.with_suffix(".bytes").read_text()) < 0.7 * whole, variant


def test_two_processes_print_the_answer_of_one_once(tmp_path: Path) -> None:
    """Of a rotated file, whose transforms span both parts."""
    config = tiny.config(eos_ids=())
    path = write_model(tmp_path / "m.rkf", config, tiny.weights(config), Rule(k=16, affine="row"), rotate=True)
    run = ["run", str(path), "--device", "cpu-torch", "--prompt", "The capital", "--raw", "--max-tokens", "24"]
    run += ["--temperature", "1", "--seed", "7"]
    done = torchrun("-m", "rkf", *run, "--tensor-parallel")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == CliRunner().invoke(cli, run).stdout


def test_alone_it_is_refused(tmp_path: Path) -> None:
    config = tiny.config()
    path = write_model(tmp_path / "m.rkf", config, tiny.weights(config))
    with pytest.raises(UsageError, match="start them with `torchrun"):
        rkf.load(path, device="cpu-torch", tensor_parallel=True)
    with pytest.raises(UsageError, match="takes no draft"):
        rkf.load(path, device="cpu-torch", tensor_parallel=True, draft=path)
    with pytest.raises(UsageError, match="device cpu: tensor parallelism needs cpu-torch or cuda"):
        rkf.load(path, tensor_parallel=True)


@pytest.mark.parametrize("prompt", [(), ("-",), ("--prompt", "-")])
def test_its_processes_do_not_read_stdin(tmp_path: Path, prompt: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli, ["run", str(tmp_path / "m.rkf"), *prompt, "--tensor-parallel"], input="Hello")
    assert done.exit_code == 2 and "cannot share stdin: give --prompt TEXT" in done.output


FORMS = [
    {"affine": "none"},
    {"affine": "both", "exceptions": 40},
    {"affine": 32, "exceptions": 9},
    {"affine": "row", "tables": 4, "exceptions": 9},
]


@pytest.mark.parametrize("k", [2, 16, 24, 100])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_shares_are_parts_of_the_decoded_matrix(k: int, form: dict[str, Any]) -> None:
    matrix = random_matrix(k, 24, 128, grid=False, **form)
    stack = replace(matrix, shape=(4, 6, 128))
    for whole, axes in ((matrix, (0, 1)), (stack, (0, 2))):
        for axis in axes:
            parts = [Share(axis, 2).of(whole, number) for number in range(2)]
            np.testing.assert_array_equal(np.concatenate([part.decode() for part in parts], axis), whole.decode())
    parts = [Share(1, 2).of(stack, number) for number in range(2)]
    np.testing.assert_array_equal(np.concatenate([part.decode() for part in parts], 1), stack.decode())
    dense = DenseTensor("f32", matrix.decode())
    np.testing.assert_array_equal(Share(1, 2).of(dense, 1).decode(), matrix.decode()[:, 64:])
    first, second = (Share(None, 2).of(dense, number).decode() for number in range(2))
    np.testing.assert_array_equal(first + second, matrix.decode())
    assert not second.any()


def test_shares_that_end_inside_something_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="end within a byte"):
        Share(1, 2).of(random_matrix(2, 8, 72), 0)
    with pytest.raises(UnsupportedError, match="end within a group of 32"):
        Share(1, 2).of(random_matrix(16, 8, 96, affine=32), 0)
    with pytest.raises(UnsupportedError, match="end within one of the tables"):
        Share(0, 2).of(random_matrix(16, 12, 16, affine="row", tables=3), 1)
