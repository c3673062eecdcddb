"""Mixtures of experts from clustered files: on the CPU, in torch, and as a GGUF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rkf.converters.export import export_gguf, export_hf
from rkf.converters.pipeline import convert
from rkf.converters.source import open_source
from rkf.file.container import open_file
from rkf.runtime.backend import Backend, Row
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.torch_backend import TorchBackend

from .models import loaded, logits_of, model_of, save, tokens

# The first variant of each family with experts.
MIXTURES = (
    *("qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "gpt_oss", "granitemoe", "ernie4_5_moe", "glm4_moe", "llama4"),
    *("qwen3_5_moe", "lfm2_moe", "gemma4-experts", "deepseek_v3"),
)


@pytest.mark.parametrize("variant", MIXTURES)
def test_a_clustered_mixture(tmp_path: Path, variant: str) -> None:
    convert(save(model_of(variant), tmp_path / "model"), tmp_path / "m.rkf", k=16)
    export_hf(tmp_path / "m.rkf", tmp_path / "back")
    expected = logits_of(loaded(tmp_path / "back"))
    export_gguf(tmp_path / "m.rkf", tmp_path / "m.gguf")
    with open_file(tmp_path / "m.rkf") as file:
        stacks = [entry for entry in file.tensors.values() if len(entry.shape) == 3]
        assert stacks and all(entry.kind == "clustered" for entry in stacks)
        for backend in (CpuBackend(file, threads=1, exact=True), TorchBackend(file)):
            found = logits(backend)
            assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
        # Rounded activations send some tokens to other experts.
        error = np.abs(logits(CpuBackend(file, threads=1)) - expected).max(1) / np.abs(expected).max()
        assert np.median(error) < 0.03
        source = open_source(tmp_path / "m.gguf")
        for name in source.tensors:
            np.testing.assert_allclose(source.read(name).decode(), file.decode(name), 1e-3, 1e-6, err_msg=name)


def logits(backend: Backend) -> np.ndarray:
    ids = np.array(tokens())
    return backend.forward([Row(backend.new_sequence(len(ids)), ids)], "all")
