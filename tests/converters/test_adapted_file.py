"""LoRA adapters at run time: the logits of peft's own model on every family, and refusals of what no op can express."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

import rkf
from rkf.calibrate.calibration import SHORT, Calibrate
from rkf.cli import cli
from rkf.converters.adapted_file import adapt
from rkf.converters.export import export_hf
from rkf.converters.pipeline import convert
from rkf.errors import BindingError, RkfError, SourceError, UnsupportedError, UsageError
from rkf.model.ops import Hadamard
from rkf.runtime.backend import Backend, Row
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.torch_backend import TorchBackend
from tests.families.models import VARIANTS, edit_json, loaded, logits_of, model_of, save, tokens

# Of peft, about transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:The following .*_pattern keys:RuntimeWarning"
)
ONE_EACH = list({variant.partition("-")[0]: variant for variant in reversed(VARIANTS)}.values())[::-1]
# Latent attention keeps this module as a matrix for each head. Routers choose experts and multiply nothing.
REFUSED = (".kv_b_proj", ".router", ".mlp.gate", ".feed_forward.gate")
_REACH = 1e-4  # of the largest logit, as in tests/families/test_logits.py


def adapter_of(folder: Path, out: Path, modules: str | list[str], **options: Any) -> Any:
    """Write a random adapter; returns peft's model, which applies it beside the weights."""
    torch.manual_seed(1)
    model = peft.get_peft_model(loaded(folder), peft.LoraConfig(r=4, target_modules=modules, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out, save_embedding_layers=False)
    return model


def layers_of(folder: Path) -> list[str]:
    """The names of a model's linear layers, without the head and what peft itself makes of two kinds.

    It refuses the outputs of Mamba, and of a mixture whose experts are fused it adapts these in place of a layer that
    has the name of their parts.
    """
    modules = dict(loaded(folder).named_modules())
    others: tuple[str, ...] = ("lm_head", "embed_out", "mixer.out_proj", "mamba.out_proj")
    if any(name.endswith(".experts") for name in modules):
        others += ("gate_proj", "up_proj", "down_proj")
    layers = (name for name, module in modules.items() if isinstance(module, torch.nn.Linear))
    return [name for name in layers if not name.endswith(others)]


def convert_dense(folder: Path, out: Path) -> Path:
    convert(folder, out / "m.rkf", recipe="dense")
    return out / "m.rkf"


def logits(backend: Backend) -> NDArray[np.float32]:
    ids = np.array(tokens())
    return backend.forward([Row(backend.new_sequence(len(ids)), ids)], "all")


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert np.abs(found - expected).max() <= _REACH * np.abs(expected).max()


@pytest.mark.parametrize("variant", ONE_EACH)
def test_the_logits_of_peft(tmp_path: Path, variant: str) -> None:
    folder = save(model_of(variant), tmp_path / "model")
    path, modules = convert_dense(folder, tmp_path), layers_of(folder)
    if refused := [module for module in modules if module.endswith(REFUSED)]:
        adapter_of(folder, tmp_path / "adapter", refused)
        with (
            rkf.open(path) as file,
            pytest.raises(UnsupportedError, match=rf"{refused[0]}: .* takes no adapter .*: me"),
        ):
            adapt(file, tmp_path / "adapter")
    expected = logits_of(adapter_of(folder, tmp_path / "adapter", [each for each in modules if each not in refused]))
    with rkf.open(path) as file:
        adapt(file, tmp_path / "adapter")
        assert_close(logits(CpuBackend(file, exact=True, threads=1)), expected)
        assert_close(logits(TorchBackend(file)), expected)


def test_an_adapter_of_some_layers_ranks_and_factors(tmp_path: Path) -> None:
    folder = save(model_of("llama"), tmp_path / "model")
    options = {"use_rslora": True, "layers_to_transform": [1], "rank_pattern": {"q_proj": 2}, "lora_alpha": 3}
    expected = logits_of(adapter_of(folder, tmp_path / "adapter", ["q_proj", "down_proj"], **options))
    convert(folder, tmp_path / "m.rkf", recipe="dense")
    with rkf.open(tmp_path / "m.rkf") as file:
        assert file.model is not None
        before = file.model.program
        adapt(file, tmp_path / "adapter")
        assert len(file.model.program.kinds) == len(before.kinds) + 1
        assert_close(logits(CpuBackend(file, exact=True, threads=1)), expected)


def test_a_rotated_file_reads_the_adapter_through_its_transforms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rkf.calibrate.calibration.CTX", 16)
    folder = save(model_of("llama"), tmp_path / "model")
    adapter_of(folder, tmp_path / "adapter", layers_of(folder))
    convert(folder, tmp_path / "m.rkf", k=16, calibrate=Calibrate(SHORT))
    export_hf(tmp_path / "m.rkf", tmp_path / "back")
    expected = logits_of(peft.PeftModel.from_pretrained(loaded(tmp_path / "back"), str(tmp_path / "adapter")))
    with rkf.open(tmp_path / "m.rkf") as file:
        assert file.model is not None
        assert any(isinstance(op, Hadamard) for op in file.model.program.kinds[0])
        adapt(file, tmp_path / "adapter")
        assert_close(logits(CpuBackend(file, exact=True, threads=1)), expected)
        assert_close(logits(TorchBackend(file)), expected)
    convert(folder, tmp_path / "quick.rkf", k=16, calibrate=Calibrate(SHORT), compensate=False)
    with rkf.open(tmp_path / "quick.rkf") as file, pytest.raises(UnsupportedError, match="--calibrate quick"):
        adapt(file, tmp_path / "adapter")


def test_commands_and_python_say_the_same(tmp_path: Path) -> None:
    folder = save(model_of("llama"), tmp_path / "model")
    adapter_of(folder, tmp_path / "adapter", "all-linear")
    path, adapter = str(convert_dense(folder, tmp_path)), str(tmp_path / "adapter")
    text = {"prompt": "the fox", "raw": True, "max_tokens": 8}
    with rkf.load(path) as plain, rkf.load(path, adapter=adapter) as adapted:
        expected = adapted.generate(**text)
        assert plain.generate(**text) != expected
    run = ["run", path, "--prompt", "the fox", "--raw", "--max-tokens", "8", "--adapter", adapter]
    assert CliRunner().invoke(cli, run).stdout == expected + "\n"
    with rkf.load(path, adapter=adapter) as adapted:  # its keys and values are of no use without it
        adapted.generate(**text)
        adapted.session(tmp_path / "session").save()
    with rkf.load(path) as plain, pytest.raises(BindingError, match="session"):
        plain.session(tmp_path / "session").load()
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 20)
    scores = []
    for options in ([], ["--adapter", adapter]):
        ppl = ["eval", "ppl", path, "--text", str(tmp_path / "text"), "--ctx", "32", "--windows", "2", *options]
        scores.append(CliRunner().invoke(cli, ppl).stdout)
    assert scores[0] != scores[1] and all(score.startswith("ppl ") for score in scores)


@pytest.mark.parametrize(
    ("variant", "modules", "error", "problem"),
    [
        ("llama-biases", ["lm_head"], UnsupportedError, r"module lm_head: .* read by .*'logits'"),
        ("qwen3", ["q_proj"], SourceError, r"module model\.layers\.0\.self_attn\.q_proj gives \[\d+, \d+\], expected"),
        ("gpt_neox", ["query_key_value"], SourceError, r"module gpt_neox\.layers\.0\..* is not in .*m\.rkf"),
    ],
)
def test_refusals(tmp_path: Path, variant: str, modules: list[str], error: type[RkfError], problem: str) -> None:
    own = variant == "llama-biases"
    path = convert_dense(save(model_of("llama" if not own else variant), tmp_path / "model"), tmp_path)
    folder = tmp_path / "model" if own else save(model_of(variant), tmp_path / "other")
    adapter_of(folder, tmp_path / "adapter", modules)
    with rkf.open(path) as file, pytest.raises(error, match=problem):
        adapt(file, tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", use_dora=True)
    with pytest.raises(UnsupportedError, match="use_dora"):
        rkf.load(path, adapter=tmp_path / "adapter")
    with pytest.raises(UsageError, match="expected the folder of a PEFT adapter"):
        rkf.load(path, adapter=tmp_path)
