"""Folders that transformers loads clustered: the same logits as decoded weights, the same file when restored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner

import rkf.bridges.transformers  # noqa: F401  (registers the quantizer)
from rkf.bridges.transformers_export import export_transformers
from rkf.bridges.transformers_restore import restore
from rkf.calibrate.calibration import SHORT, Calibrate
from rkf.cli import cli
from rkf.converters.export import export_hf
from rkf.converters.pipeline import convert
from rkf.errors import OutputError, SourceError
from rkf.file.container import open_file
from rkf.torch import ClusteredWeight
from tests.families.models import edit_json, loaded, logits_of, model_of, save, tokens

# Fused rows, rows by heads, scaled embeddings, tied heads, biases; experts apart, transposed, under other names. Parts
# of deepseek_v3's latent attention are in no layer of their own, so they are decoded.
VARIANTS = ["llama-biases", "phi3", "gemma3", "gpt_neox", "olmo2", "mixtral", "gpt_oss", "qwen3_5_moe", "deepseek_v3"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A llama at K = 16, with a tied head."""
    return converted(tmp_path, "llama")


def converted(tmp_path: Path, variant: str) -> Path:
    convert(save(model_of(variant), tmp_path / "model"), tmp_path / "m.rkf", k=16)
    return tmp_path / "m.rkf"


def ranks_of(path: Path) -> tuple[bytes, bytes]:
    with open_file(path) as file:
        return file.ranks_id, file.dense_id


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logits_and_the_way_back(tmp_path: Path, variant: str) -> None:
    path = converted(tmp_path, variant)
    export_hf(path, tmp_path / "dense")
    decoded = export_transformers(path, tmp_path / "clustered")
    assert bool(decoded) == (variant == "deepseek_v3"), decoded
    model = loaded(tmp_path / "clustered")
    expected = logits_of(loaded(tmp_path / "dense"))
    np.testing.assert_allclose(logits_of(model), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    save_again(model, tmp_path / "clustered", tmp_path / "again")
    restore(tmp_path / "again", tmp_path / "restored.rkf")
    assert ranks_of(tmp_path / "restored.rkf") == ranks_of(path) or decoded


def save_again(model: Any, folder: Path, out: Path) -> None:
    model.save_pretrained(out)
    (out / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())


def test_a_folder_without_its_tokenizer_is_refused(small: Path, tmp_path: Path) -> None:
    export_transformers(small, tmp_path / "clustered")
    loaded(tmp_path / "clustered").save_pretrained(tmp_path / "again")
    with pytest.raises(SourceError, match=r"again: tokenizer\.json is missing: write it there too"):
        restore(tmp_path / "again", tmp_path / "restored.rkf")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "clustered").save_pretrained(tmp_path / "again")
    restore(tmp_path / "again", tmp_path / "restored.rkf")
    assert ranks_of(tmp_path / "restored.rkf") == ranks_of(small)


def test_a_rotated_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkf.calibrate.calibration.CTX", 16)
    path = tmp_path / "m.rkf"
    convert(save(model_of("gemma3"), tmp_path / "model"), path, k=16, calibrate=Calibrate(SHORT), compensate=False)
    export_hf(path, tmp_path / "dense")
    export_transformers(path, tmp_path / "clustered")
    blocks = [part["block"] for layer in layers_of(tmp_path / "clustered").values() for part in layer["parts"]]
    assert any(blocks)
    expected = logits_of(loaded(tmp_path / "dense"))
    np.testing.assert_allclose(logits_of(loaded(tmp_path / "clustered")), expected, rtol=0, atol=1e-4)


def layers_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    return found


def test_text_is_generated_in_bf16(small: Path, tmp_path: Path) -> None:
    export_transformers(small, tmp_path / "clustered")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "clustered", dtype=torch.bfloat16)
    weights = [module for module in model.modules() if isinstance(module, ClusteredWeight)]
    assert weights and all(each.centroids.dtype == torch.float32 for each in weights)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    found = model.generate(torch.tensor([tokens()[:4]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert found.shape == (1, 8)


def test_gradients_reach_the_centroids(small: Path, tmp_path: Path) -> None:
    export_transformers(small, tmp_path / "clustered")
    model = loaded(tmp_path / "clustered")
    ids = torch.tensor([tokens()])
    model(ids, labels=ids).loss.backward()
    missing = [name for name, value in model.named_parameters() if name.endswith("centroids") and value.grad is None]
    assert missing == []


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_lora_on_a_frozen_base(small: Path, tmp_path: Path) -> None:
    export_transformers(small, tmp_path / "clustered")
    base = loaded(tmp_path / "clustered")
    before = logits_of(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    np.testing.assert_array_equal(logits_of(model), before)  # an adapter begins as nothing
    ids = torch.tensor([tokens()])
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 1.0)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_the_commands(small: Path, tmp_path: Path) -> None:
    folder, out = str(tmp_path / "c"), str(tmp_path / "r.rkf")
    for arguments in (["export", "transformers", str(small), folder], ["restore", folder, out]):
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
    assert ranks_of(tmp_path / "r.rkf") == ranks_of(small)
    refused = CliRunner().invoke(cli, ["restore", str(tmp_path / "model"), str(tmp_path / "x.rkf")])
    assert refused.exit_code == 1 and "no quantization_config of rkf" in refused.output


@pytest.mark.parametrize(
    "change",
    [
        {"layers": {"model.layers.0.mlp.up_proj": {"parts": [{}]}}},
        {"layers": 3},
        {"container": "!"},
        {"container": "AAAA"},
    ],
)
def test_a_damaged_configuration(small: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    export_transformers(small, tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    edit_json(tmp_path / "c" / "config.json", quantization_config={**config["quantization_config"], **change})
    with pytest.raises(SourceError, match="quantization_config"):
        restore(tmp_path / "c", tmp_path / "r.rkf")
    assert not (tmp_path / "r.rkf").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_no_file_of_the_folder_is_overwritten(small: Path, tmp_path: Path, name: str) -> None:
    export_transformers(small, tmp_path / "clustered")
    before = (tmp_path / "clustered" / name).read_bytes()
    with pytest.raises(OutputError, match="the output is the input"):
        restore(tmp_path / "clustered", tmp_path / "clustered" / name, force=True)
    assert (tmp_path / "clustered" / name).read_bytes() == before
