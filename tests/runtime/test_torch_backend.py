"""The torch backend against the numpy oracle and the exact CPU backend: families, caches, refusals."""

import numpy as np
import pytest
import torch

import rkf
from rkf.cluster.recipe import Rule
from rkf.errors import ContextLengthError, UsageError
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.torch_backend import TorchBackend
from rkf.runtime.torch_graph import TokenStep
from rkf.runtime.torch_model import Decoder
from tests.runtime import tiny
from tests.runtime.files import write_model
from tests.runtime.numpy_backend import NumpyBackend
from tests.runtime.test_numpy_backend import FAMILIES, reference

IDS = np.random.Generator(np.random.Philox(key=3)).integers(0, 400, 150)
PARTS = np.split(IDS, [1, 2, 20, 130, 131])
RULES = {
    "dense": None,
    "grid": Rule(k=16, grid=True, affine="row", exceptions=0.002),
    "groups": Rule(k=24, affine="group", group=32),
}


def logits(backend, parts):
    cache = backend.new_cache(256)
    return np.concatenate([backend.forward(part, cache, last_only=False) for part in parts])


def relative(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_equals_numpy_and_the_exact_processor_backend(tmp_path, rule):
    config = tiny.config()
    with rkf.open(write_model(tmp_path / "m.rkf", config, tiny.weights(config), rule)) as container:
        found = logits(TorchBackend(container), PARTS)
        decoded = {name: container.decode(name) for name in container.tensors}
        assert relative(found, logits(NumpyBackend(config, decoded), PARTS)) < 1e-4
        assert relative(found, logits(CpuBackend(container, exact=True), PARTS)) < 1e-4


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES.keys())
def test_equals_transformers(tmp_path, changes):
    config = tiny.config(**changes)
    theirs = reference(config)
    weights = {name: value.detach().numpy() for name, value in theirs.state_dict().items() if name != "lm_head.weight"}
    with rkf.open(write_model(tmp_path / "m.rkf", config, weights)) as container, torch.no_grad():
        wanted = theirs(torch.from_numpy(IDS)[None]).logits[0].numpy()
        assert relative(logits(TorchBackend(container), PARTS), wanted) < 1e-4


def test_a_window_hides_what_is_further_away(tmp_path):
    config = tiny.config(architecture="mistral", sliding_window=24)
    with rkf.open(write_model(tmp_path / "m.rkf", config, tiny.weights(config))) as container:
        wanted = logits(CpuBackend(container, exact=True), PARTS)
        assert relative(logits(TorchBackend(container), PARTS), wanted) < 1e-4
        assert relative(logits(TorchBackend(container), [IDS]), wanted) < 1e-4


def test_a_truncated_cache_continues_as_a_fresh_one(tmp_path):
    config = tiny.config()
    with rkf.open(write_model(tmp_path / "m.rkf", config, tiny.weights(config))) as container:
        backend = TorchBackend(container)
        cache = backend.new_cache(256)
        backend.forward(IDS[:60], cache, last_only=True)
        cache.truncate(30)
        found = backend.forward(IDS[30:40], cache, last_only=True)
        assert cache.length == 40
        assert relative(found, backend.forward(IDS[:40], backend.new_cache(256), last_only=True)) < 1e-5


@pytest.mark.parametrize("window", [None, 24])
def test_steps_of_standing_buffers_equal_the_decoder(tmp_path, window):
    config = tiny.config(architecture="mistral", sliding_window=window)
    path = write_model(tmp_path / "m.rkf", config, tiny.weights(config), RULES["groups"])
    with rkf.open(path) as container, torch.inference_mode():
        decoder = Decoder(container)
        expected = decoder.head(decoder(torch.from_numpy(IDS)[None])[0])
        cache = decoder.new_cache(1, 256)
        decoder(torch.from_numpy(IDS[:100])[None], cache)
        step = TokenStep(decoder, cache)
        for position in range(100, 150):
            step.place(int(IDS[position]), position)
            for _ in range(2):  # as a capture does: again makes no difference
                found = step.compute()
            assert relative(found[0].numpy(), expected[position].numpy()) < 1e-4


def test_what_does_not_fit_is_refused(tmp_path):
    config = tiny.config()
    with rkf.open(write_model(tmp_path / "m.rkf", config, tiny.weights(config))) as container:
        backend = TorchBackend(container)
        cache = backend.new_cache(16)
        with pytest.raises(ContextLengthError):
            backend.forward(IDS[:17], cache, last_only=True)
        for bad in (np.array([400]), np.array([-1]), np.array([], np.int64)):
            with pytest.raises(UsageError):
                backend.forward(bad, cache, last_only=True)
        with pytest.raises(UsageError):
            cache.truncate(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_no_gpu_is_said_in_one_line(tmp_path):
    config = tiny.config()
    path = write_model(tmp_path / "m.rkf", config, tiny.weights(config))
    with pytest.raises(UsageError, match="no GPU"):
        rkf.load(path, device="cuda")
    with pytest.raises(UsageError, match="expected cpu, cpu-torch or cuda, got 'tpu'"):
        rkf.load(path, device="tpu")


def test_text_through_torch_is_the_text_of_the_exact_backend(tmp_path):
    config = tiny.config(eos_ids=())
    path = write_model(tmp_path / "m.rkf", config, tiny.weights(config), RULES["grid"])
    with rkf.load(path, exact=True) as one, rkf.load(path, device="cpu-torch") as other:
        assert one.generate("The capital", raw=True, max_tokens=64) == other.generate(
            "The capital", raw=True, max_tokens=64
        )
