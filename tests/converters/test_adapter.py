"""LoRA adapters at conversion: the logits of the model that peft merges, and refusals of what is more than LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from rkf.cli import cli
from rkf.converters.adapter import AdaptedSource, Adapter
from rkf.converters.pipeline import convert
from rkf.converters.source import open_source
from rkf.errors import MOST_MESSAGE, RkfError, SourceError, UnsupportedError, UsageError
from rkf.file.container import open_file
from tests.families.models import edit_json, loaded, logits_of, model_of, save, tokens
from tests.spec.reference import run

# Of peft, about transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
MODULES = {"llama": ["q_proj", "down_proj"], "phi3": ["qkv_proj", "gate_up_proj"], "gpt_neox": ["query_key_value"]}


def adapted(tmp_path: Path, variant: str, **options: Any) -> tuple[Path, Path, Any]:
    """A model's folder, an adapter's, and the merged model."""
    folder = save(model_of(variant), tmp_path / "model")
    config = peft.LoraConfig(r=4, target_modules=MODULES[variant], **options)
    model = peft.get_peft_model(loaded(folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "adapter")
    return folder, tmp_path / "adapter", model.merge_and_unload()


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "alpha_pattern": {"down_proj": 3}, "rank_pattern": {"q_proj": 2}}),
        ("phi3", {}),
        ("gpt_neox", {"lora_alpha": 2}),
    ],
)
def test_the_logits_of_the_merged_model(tmp_path: Path, variant: str, options: dict[str, Any]) -> None:
    folder, adapter, merged = adapted(tmp_path, variant, **options)
    convert(folder, tmp_path / "m.rkf", recipe="dense", adapter=adapter)
    expected = logits_of(merged)
    np.testing.assert_allclose(run(tmp_path / "m.rkf", tokens()), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    with open_file(tmp_path / "m.rkf") as file:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= file.provenance["source"]["files"].keys()
        assert file.provenance["source"]["label"] == "model with adapter"


def test_the_command(tmp_path: Path) -> None:
    folder, adapter, _ = adapted(tmp_path, "llama")
    arguments = ["convert", str(folder), str(tmp_path / "m.rkf"), "--calibrate", "none", "--adapter", str(adapter)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    over = CliRunner().invoke(cli, [*arguments[:2], str(adapter / "adapter_config.json"), *arguments[3:], "--force"])
    assert over.exit_code != 0 and (adapter / "adapter_config.json").read_text().startswith("{")


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"use_dora": True}, UnsupportedError, "use_dora True cannot be applied"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedError, "modules_to_save"),
        ({"bias": "all"}, UnsupportedError, "bias 'all'"),
        ({"peft_type": "IA3"}, UnsupportedError, "peft_type 'IA3'"),
        ({"lora_alpha": "8"}, SourceError, "lora_alpha: expected"),
        ({"alpha_pattern": {"(": 1}}, SourceError, "alpha_pattern"),
        ({"alpha_pattern": [1]}, SourceError, "alpha_pattern"),
        ({"alpha_pattern": {r"([\w.]+)+x": 1}}, SourceError, "too long"),
        ({"alpha_pattern": {r"[\w.]*[\w.]*[\w.]*x": 1}}, SourceError, "too long"),
        ({"alpha_pattern": {r"(?=a)\w": 1}}, SourceError, "too long"),
        ({"alpha_pattern": {f"q{n}.*": 1 for n in range(60)}}, SourceError, "too long"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, SourceError, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": 10**400}}, SourceError, "lora_alpha"),
        ({"lora_alpha": 1e300}, SourceError, "lora_alpha"),
        ({"alpha_pattern": {"(" * 5000 + ")" * 5000: 1}}, SourceError, "alpha_pattern: a regular expression is nested"),
        ({"alpha_pattern": {f"q{n}": 1 for n in range(2000)}}, SourceError, "alpha_pattern: expected at most 1000"),
        ({"rank_pattern": {"a|" * 100_000: 1}}, SourceError, "rank_pattern: expected at most .* 100000 characters"),
        ({"rank_pattern": {"q_proj": "2"}}, SourceError, "rank_pattern: expected numbers"),
        ({"r": 0}, SourceError, "r: expected"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "also changes the model's own weights"),
        ({"init_lora_weights": "OLoRA"}, UnsupportedError, "also changes the model's own weights"),
    ],
)
def test_refusals(tmp_path: Path, change: dict[str, Any], error: type[RkfError], problem: str) -> None:
    _, adapter, _ = adapted(tmp_path, "llama")
    edit_json(adapter / "adapter_config.json", **change)
    with pytest.raises(error, match=problem):
        Adapter(adapter)


@pytest.mark.parametrize("keys", [{"r": 64}, {"rank_pattern": {"q_proj": 8}}])
def test_a_rank_that_the_tensors_do_not_have(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder, adapter, _ = adapted(tmp_path, "llama")
    edit_json(adapter / "adapter_config.json", **keys)
    with pytest.raises(SourceError, match=r"has rank 4, but adapter_config\.json says"):
        AdaptedSource(open_source(folder), Adapter(adapter))


def test_an_adapter_that_changes_its_model_where_peft_loads_it(tmp_path: Path) -> None:
    """The reason for the refusal of `pissa`: what peft runs then is not W + B A."""
    folder, adapter, _ = adapted(tmp_path, "llama")
    edit_json(adapter / "adapter_config.json", init_lora_weights="pissa")
    model = loaded(folder)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    layer = peft.PeftModel.from_pretrained(model, adapter).base_model.model.model.layers[0].self_attn.q_proj
    assert not torch.equal(layer.base_layer.weight, before)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda held: held[A].__setitem__((0, 0), np.nan), "q_proj, lora_A: NaN or infinite values"),
        (lambda held: held.update({A.replace("weight", "other.weight"): held[A]}), "two tensors are its lora_A"),
        (lambda held: held.clear(), "expected a LoRA product, got no tensor"),
        (lambda held: held.update({"x" * 100_000: held[A]}), "is not half of a LoRA product"),
    ],
)
def test_odd_tensors(tmp_path: Path, change: Callable[[dict[str, Any]], None], problem: str) -> None:
    folder, adapter, _ = adapted(tmp_path, "llama")
    held = load_file(adapter / "adapter_model.safetensors")
    change(held)
    save_file(held, adapter / "adapter_model.safetensors")
    with pytest.raises(RkfError, match=problem) as refused:
        AdaptedSource(open_source(folder), Adapter(adapter)).read("model.layers.0.self_attn.q_proj.weight")
    assert len(str(refused.value)) <= MOST_MESSAGE


def test_a_product_that_overflows_is_infinite_without_a_warning(tmp_path: Path) -> None:
    folder, adapter, _ = adapted(tmp_path, "llama")
    held = load_file(adapter / "adapter_model.safetensors")
    save_file({name: half * np.float32(1e30) for name, half in held.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="NaN or infinite weights"):
        convert(folder, tmp_path / "m.rkf", recipe="dense", adapter=adapter)


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    _, adapter, _ = adapted(tmp_path, "llama")
    other = open_source(save(model_of("phi3"), tmp_path / "other"))
    with pytest.raises(SourceError, match=r"module model\.layers\.0\.self_attn\.q_proj is not in other"):
        AdaptedSource(other, Adapter(adapter))
    with pytest.raises(UsageError, match=r"expected the folder of a PEFT adapter"):
        Adapter(tmp_path / "model")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"adapter_model\.safetensors is missing"):
        Adapter(adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
