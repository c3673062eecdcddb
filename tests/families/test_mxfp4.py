"""A checkpoint with its experts in MXFP4: the values of transformers, exactly, and an export without the packing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rkf.converters.export import export_hf
from rkf.converters.pipeline import convert
from rkf.converters.source import open_source
from rkf.errors import SourceError

from .models import edit_json, model_of, save


def packed(folder: Path, *, scales: bool = True) -> dict[str, torch.Tensor]:
    """Pack the experts of a saved model; returns the values that transformers reads then, by name."""
    tensors, values = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, cols, rows = tensors.pop(name).shape
        codes = torch.randint(0, 256, (experts, rows, cols // 32, 16), dtype=torch.uint8, generator=generator)
        exponents = torch.randint(118, 124, (experts, rows, cols // 32), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_blocks"] = codes
        if scales:
            tensors[f"{name}_scales"] = exponents
        values[name] = convert_moe_packed_tensors(codes, exponents, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    return values


def test_values_are_exact(tmp_path: Path) -> None:
    folder = save(model_of("gpt_oss"), tmp_path / "model", "bfloat16")
    values = packed(folder)
    source = open_source(folder)
    assert source.tensors["model.layers.0.mlp.experts.gate_proj.weight"].dtype == "bf16"
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts."
        both = values[f"{prefix}gate_up_proj"].float().numpy().swapaxes(1, 2)
        down = values[f"{prefix}down_proj"].float().numpy().swapaxes(1, 2)
        for part, expected in (("gate_proj", both[:, ::2]), ("up_proj", both[:, 1::2]), ("down_proj", down)):
            np.testing.assert_array_equal(source.read(f"{prefix}{part}.weight").decode(), expected)


def test_the_export_is_not_packed(tmp_path: Path) -> None:
    folder = save(model_of("gpt_oss"), tmp_path / "model", "bfloat16")
    values = packed(folder)
    convert(folder, tmp_path / "m.rkf", recipe="dense")
    export_hf(tmp_path / "m.rkf", tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    written = load_file(tmp_path / "back" / "model.safetensors")
    for name, expected in values.items():
        assert torch.equal(written[name], expected), name


def test_blocks_without_scales(tmp_path: Path) -> None:
    folder = save(model_of("gpt_oss"), tmp_path / "model", "bfloat16")
    packed(folder, scales=False)
    with pytest.raises(SourceError, match=r"_scales: expected shape \(8, .*got none"):
        open_source(folder)
