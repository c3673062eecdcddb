"""Decoders inside other models, under the names of published checkpoints; tensors that the reference ignores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rkf.converters.export import export_gguf, export_hf
from rkf.converters.families import glm4_moe
from rkf.converters.pipeline import convert
from rkf.converters.source import open_source
from rkf.file.container import open_file

from .models import edit_json, model_of, save

PREFIX = "model.language_model."


def rewritten(folder: Path, prefix: str, extra: list[str]) -> None:
    """Give the decoder's tensors a longer prefix, and add tensors that are no part of it."""
    tensors = load_file(folder / "model.safetensors")
    found = {
        name.replace("model.", prefix, 1) if name.startswith("model.") else name: each for name, each in tensors.items()
    }
    found |= {name: torch.ones(2, 2) for name in extra}
    save_file(found, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("variant", "outer", "prefix", "extra"),
    [
        ("qwen3_5", "qwen3_5", PREFIX, ["model.visual.patch_embed.weight", "mtp.layers.0.mlp.up_proj.weight"]),
        ("qwen3_5_moe", "qwen3_5_moe", PREFIX, ["model.visual.patch_embed.weight", "mtp.norm.weight"]),
        (
            "gemma4",
            "gemma4",
            PREFIX,
            ["model.vision_tower.x.weight", "model.audio_tower.x.weight", "model.embed_vision.x"],
        ),
        (
            "llama4-chunks",
            "llama4",
            "language_model.model.",
            ["vision_model.class_embedding", "multi_modal_projector.x"],
        ),
    ],
)
def test_a_decoder_inside_another_model(
    tmp_path: Path, variant: str, outer: str, prefix: str, extra: list[str]
) -> None:
    inner = open_source(save(model_of(variant), tmp_path / "inner"))
    folder = save(model_of(variant), tmp_path / "outer")
    rewritten(folder, prefix, extra)
    text = json.loads((folder / "config.json").read_text())
    config = {"model_type": outer, "text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}
    (folder / "config.json").write_text(json.dumps(config))
    source = open_source(folder)
    assert source.model.program == inner.model.program
    for name in inner.tensors:
        np.testing.assert_array_equal(source.read(name).decode(), inner.read(name).decode())


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_llama4_is_tied_as_its_decoder_says(tmp_path: Path, tied: bool) -> None:
    """The reference has the head inside the decoder there, and does not read the outer key."""
    variant = "llama4-chunks" if tied else "llama4"
    folder = save(model_of(variant), tmp_path / "model")
    rewritten(folder, "language_model.model.", [])
    text = json.loads((folder / "config.json").read_text())
    assert text["tie_word_embeddings"] is tied
    config = {"model_type": "llama4", "text_config": text, "tie_word_embeddings": not tied}
    (folder / "config.json").write_text(json.dumps(config))
    assert bool(open_source(folder).aliases) is tied
    convert(folder, tmp_path / "m.rkf", recipe="dense")
    export_hf(tmp_path / "m.rkf", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(tmp_path / "back" / "model.safetensors")) is not tied


def test_layers_after_the_last_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They predict several tokens at once. A GGUF counts them among its blocks."""
    own = dict(open_source(save(model_of("glm4_moe"), tmp_path / "model")).tensors)
    rewritten(tmp_path / "model", "model.", ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.gate.weight"])
    assert open_source(tmp_path / "model").tensors == own
    edit_json(tmp_path / "model" / "config.json", num_hidden_layers=2)
    convert(tmp_path / "model", tmp_path / "m.rkf", recipe="dense")
    edit_json(tmp_path / "model" / "config.json", num_hidden_layers=3)
    convert(tmp_path / "model", tmp_path / "more.rkf", recipe="dense")
    counted = glm4_moe.grouped_fields
    monkeypatch.setattr(glm4_moe, "grouped_fields", lambda keys: counted(keys) | {"nextn_predict_layers": 1})
    export_gguf(tmp_path / "more.rkf", tmp_path / "more.gguf")
    with open_file(tmp_path / "m.rkf") as file:
        assert list(open_source(tmp_path / "more.gguf").tensors) == list(file.tensors)


@pytest.mark.parametrize("variant", ["ernie4_5", "ernie4_5_moe"])
def test_fused_tensors_of_other_names(tmp_path: Path, variant: str) -> None:
    folder = save(model_of(variant), tmp_path / "model")
    before, path = open_source(folder), folder / "model.safetensors"
    values = {name: before.read(name).decode() for name in before.tensors}
    tensors = load_file(path)
    for fused, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("up_gate_proj", ("gate_proj", "up_proj"))):
        for name in [name for name in tensors if f".{parts[0]}." in name]:
            each = [tensors.pop(name.replace(parts[0], part)) for part in parts]
            tensors[name.replace(parts[0], fused)] = torch.cat(each)
    tensors = {name.replace("model.", "ernie.", 1): each for name, each in tensors.items()}
    assert any("experts.7.up_gate_proj" in name for name in tensors) == (variant == "ernie4_5_moe")
    save_file(tensors, path, {"format": "pt"})
    after = open_source(folder)
    for name, expected in values.items():
        np.testing.assert_array_equal(after.read(name).decode(), expected, err_msg=name)


def test_own_keys_and_values_of_a_layer_that_shares_are_ignored(tmp_path: Path) -> None:
    folder = save(model_of("gemma4"), tmp_path / "model")
    rewritten(folder, "model.", ["model.layers.5.self_attn.k_proj.weight", "model.layers.4.self_attn.v_proj.weight"])
    assert "model.layers.5.self_attn.k_proj.weight" not in open_source(folder).tensors
