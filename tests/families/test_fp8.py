"""Checkpoints in FP8: the values of torch and transformers, exactly, and an export without the packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rkf.converters.export import export_hf
from rkf.converters.pipeline import convert
from rkf.converters.source import open_source
from rkf.errors import SourceError

from .models import edit_json, loaded, model_of, save

CHANNELS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
}


def packed(folder: Path, how: dict[str, Any], rows: int | None, cols: int | None, end: str) -> dict[str, torch.Tensor]:
    """Pack the matrices of a saved model; returns their values, f32. rows, cols: of a block, None for all of them."""
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj" in name and name.endswith("weight")]:
        weight = tensors[name].float()
        high, wide = rows or weight.shape[0], cols or weight.shape[1]
        grid = [-(-size // each) for size, each in zip(weight.shape, (high, wide), strict=True)]
        scales = torch.rand(grid, generator=torch.Generator().manual_seed(len(name))) + 0.5
        spread = scales.repeat_interleave(high, 0).repeat_interleave(wide, 1)[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
        tensors[name + end] = scales if rows or cols else scales[0, 0]
        tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor(1.0)
        values[name] = tensors[name].float() * spread
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", quantization_config=how)
    return values


@pytest.mark.parametrize(
    ("variant", "how", "rows", "cols", "end"),
    [
        (
            "phi3",
            {"quant_method": "fp8", "weight_block_size": [24, 40]},
            24,
            40,
            "_scale_inv",
        ),  # rows of fused matrices
        ("qwen3_moe", CHANNELS, 1, None, "_scale"),
        ("ministral3", {"quant_method": "fp8", "activation_scheme": "static"}, None, None, "_scale_inv"),
    ],
)
def test_values_are_exact(tmp_path: Path, variant: str, how: Any, rows: Any, cols: Any, end: str) -> None:
    folder = save(model_of(variant), tmp_path / "model", "bfloat16")
    values = packed(folder, how, rows, cols, end)
    convert(folder, tmp_path / "m.rkf", recipe="dense")
    export_hf(tmp_path / "m.rkf", tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    written = load_file(tmp_path / "back" / "model.safetensors")
    for name, expected in values.items():
        assert torch.equal(written[name], expected), name


def test_the_same_as_transformers_reads(tmp_path: Path) -> None:
    folder = save(model_of("qwen3-plain"), tmp_path / "model", "bfloat16")
    packed(folder, {"quant_method": "fp8", "weight_block_size": [32, 16]}, 32, 16, "_scale_inv")
    theirs, source = loaded(folder).state_dict(), open_source(folder)
    for name in source.tensors:
        np.testing.assert_array_equal(source.read(name).decode(), theirs[name].numpy(), err_msg=name)


def test_codes_without_their_scales(tmp_path: Path) -> None:
    folder = save(model_of("qwen3-plain"), tmp_path / "model", "bfloat16")
    packed(folder, {"quant_method": "fp8", "weight_block_size": [32, 16]}, 32, 16, "_scales")
    with pytest.raises(SourceError, match=r"down_proj.weight_scale_inv: expected shape \[2, 6\], got none"):
        open_source(folder)
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [0, 16]})
    with pytest.raises(SourceError, match=r"weight_block_size: expected two integers of at least 1, got \[0, 16\]"):
        open_source(folder)
    edit_json(folder / "config.json", quantization_config=CHANNELS | {"format": "pack-quantized"})
    with pytest.raises(SourceError, match=r"already quantised .*compressed-tensors, pack-quantized"):
        open_source(folder)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"transform_config": {"config_groups": {"R3": {"type": "hadamard"}}}}, "transformed weights"),
        ({"transform_config": [1]}, "transformed weights"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        ({"transform_config": {}, "sparsity_config": {"format": "dense"}}, None),
        ({"transform_config": None, "sparsity_config": {}}, None),
    ],
)
def test_what_acts_beside_codes_and_scales(tmp_path: Path, more: dict[str, Any], problem: str | None) -> None:
    folder = save(model_of("qwen3-plain"), tmp_path / "model", "bfloat16")
    packed(folder, CHANNELS | more, 1, None, "_scale")
    if problem is None:
        assert open_source(folder).tensors
    else:
        with pytest.raises(SourceError, match=f"{problem} are not read; give the original checkpoint"):
            open_source(folder)
