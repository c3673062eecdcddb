"""The torch passes of a calibration against the numpy ones, on the CPU."""

import numpy as np
import pytest
import torch

from rkf.calibrate import passes, sensitivity
from rkf.calibrate.calibration import SHORT, Calibrate
from rkf.calibrate.devices import Cpu, device_of
from rkf.calibrate.passes import TensorReader
from rkf.converters.pipeline import convert
from rkf.errors import UsageError
from rkf.file.container import open_file
from tests.calibrate.small_models import small_model
from tests.calibrate.test_calibration import predicted
from tests.calibrate.test_sensitivity import coarse
from tests.families.models import model_of, save

TOKENS = np.random.Generator(np.random.Philox(1)).integers(0, 64, (43, 60)).astype(np.uint32)
TORCH = device_of("cpu-torch")
FAMILIES = ["llama", "gemma3_text", "gpt_oss", "qwen3_moe", "qwen3_5_text", "lfm2"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    _, program, weights = small_model(request.param)
    return program, TensorReader(weights.__getitem__)


def moments_of(device, model):
    """By name, those of stacks one by one; and how many tokens each matrix of a stack saw."""
    found, counts = {}, {}
    for layer in device.moments(*model, TOKENS):
        for name, each in layer.items():
            if isinstance(each, np.ndarray):
                found[name] = each
                continue
            counts[name] = each.counts.tolist()
            found |= {f"{name}[{i}]": each.of(i) for i, count in enumerate(counts[name]) if count}
    return found, counts


@pytest.fixture
def exact(monkeypatch):
    """The numpy passes with matrices in f32: in eight bits, some tokens go to other experts."""
    for module in (passes, sensitivity):
        monkeypatch.setattr(module, "rounded", lambda weights: weights)
    return Cpu()


def test_moments_are_those_of_numpy(model, exact):
    (found, counts), (expected, expected_counts) = (moments_of(device, model) for device in (TORCH, exact))
    assert found.keys() == expected.keys() and counts == expected_counts
    for name, each in found.items():  # numpy multiplies inputs in eight bits
        assert np.linalg.norm(each - expected[name]) < 0.01 * np.linalg.norm(expected[name]), name


def test_losses_are_those_of_numpy(model, exact):
    found, expected = (device.losses(*model, coarse, TOKENS) for device in (TORCH, exact))
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        assert loss == pytest.approx(expected[name], rel=1e-3), name


def test_texts_are_drawn_as_in_numpy(model, tmp_path):
    program, reader = model
    prompts = [[1], [5, 6, 7], [9], [2, 3]]
    text = TORCH.write_text(program, reader, prompts, ctx=24, folder=tmp_path, progress=None)
    for row, prompt in zip(text, prompts, strict=True):
        assert row[: len(prompt)].tolist() == prompt
    shares = np.exp(predicted(program, reader, text).astype(np.float64))
    cumulative = (shares / shares.sum(-1, keepdims=True)).cumsum(-1)
    for position in range(3, 24):
        drawn, before = text[:, position], cumulative[:, position - 1]
        for token, row, point in zip(drawn, before, passes.points(0, position, len(prompts)), strict=True):
            assert (row[token - 1] if token else 0) - 1e-4 < point < row[token] + 1e-4


def test_a_conversion_has_the_same_recipe_and_says_where_its_passes_ran(tmp_path, monkeypatch):
    monkeypatch.setattr("rkf.calibrate.calibration.CTX", 16)
    folder = save(model_of("gemma3"), tmp_path / "model")
    files = []
    for name in ("cpu", "cpu-torch"):
        path = tmp_path / f"{name}.rkf"
        convert(folder, path, bpw=5, calibrate=Calibrate(SHORT, device=device_of(name)))
        with open_file(path) as container:
            files.append(container.provenance)
    one, other = (each.pop("calibration") for each in files)
    assert other.pop("device") == "cpu-torch" and "device" not in one
    assert one == other and files[0]["recipe"] == files[1]["recipe"]


def test_devices_that_are_missing_are_refused():
    with pytest.raises(UsageError, match=r"device: expected cpu, cpu-torch or cuda, got 'tpu'"):
        device_of("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="finds no GPU here"):
            device_of("cuda")
