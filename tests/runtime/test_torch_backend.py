"""The torch backend against the reference of the specification and the exact CPU backend: rows, caches, refusals."""

import gc

import numpy as np
import pytest
import torch

import rkf
from rkf.cluster.recipe import Rule
from rkf.errors import ContextLengthError, UsageError
from rkf.runtime import torch_backend
from rkf.runtime.backend import Row
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.engine import Engine
from rkf.runtime.torch_backend import TorchBackend
from rkf.runtime.torch_graph import TokenStep
from rkf.runtime.torch_model import Decoder
from tests.runtime import tiny
from tests.runtime.asking import Recorded, run
from tests.runtime.files import write_model
from tests.runtime.test_numpy_backend import FAMILIES, reference
from tests.spec.document import VECTORS
from tests.spec.reference import run_program

IDS = np.random.Generator(np.random.Philox(key=3)).integers(0, 400, 150)
PARTS = np.split(IDS, [1, 2, 20, 130, 131])
RULES = {
    "dense": None,
    "grid": Rule(k=16, grid=True, affine="row", exceptions=0.002),
    "groups": Rule(k=24, affine="group", group=32),
}


def logits(backend, parts):
    sequence = backend.new_sequence(256)
    return np.concatenate([backend.forward([Row(sequence, part)], "all") for part in parts])


def relative(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_equals_the_specifications_reference_and_the_exact_processor_backend(tmp_path, rule):
    config = tiny.config()
    with rkf.open(write_model(tmp_path / "m.rkf", config, tiny.weights(config), rule)) as container:
        found = logits(TorchBackend(container), PARTS)
        decoded = {name: container.decode(name) for name in container.tensors}
        wanted = run_program(container.model.program.to_metadata(), decoded, IDS)
        assert relative(found, wanted) < 1e-5
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
        sequence = backend.new_sequence(256)
        backend.forward([Row(sequence, IDS[:60])])
        sequence.truncate(30)
        found = backend.forward([Row(sequence, IDS[30:40])])
        assert sequence.length == 40
        assert relative(found, backend.forward([Row(backend.new_sequence(256), IDS[:40])])) < 1e-5


@pytest.mark.parametrize("file", ["program-plain.rkf", "program-recurrent.rkf"])
def test_a_fork_goes_its_own_way(file):
    with rkf.open(VECTORS / file) as container:
        backend, ids = TorchBackend(container), IDS[:12] % 16
        wanted = logits(backend, [ids])
        first = backend.new_sequence(32)
        backend.forward([Row(first, ids[:6])])
        second = first.fork()
        backend.forward([Row(first, ids[:4])])
        assert relative(backend.forward([Row(second, ids[6:])], "all"), wanted[6:]) < 1e-5
        assert (first.length, second.length) == (10, 12)


def test_rows_give_the_logits_that_are_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_backend, "_TILE", 16)  # so that a row has several passes
    config = tiny.config()
    with rkf.open(write_model(tmp_path / "m.rkf", config, tiny.weights(config))) as container:
        backend = TorchBackend(container)
        parts = IDS[:40], IDS[40:41], IDS[41:60]
        alone = np.concatenate([backend.forward([Row(backend.new_sequence(64), part)], "all") for part in parts])

        def together(wanted):
            return backend.forward([Row(backend.new_sequence(64), part) for part in parts], wanted)

        assert relative(together("all"), alone) < 1e-5
        assert relative(together("last"), alone[[39, 40, 59]]) < 1e-5
        for places in ([0, 15, 16, 39, 40, 45], [58], []):
            assert together(np.array(places, np.int64)).shape == (len(places), config.vocab_size)
        assert relative(together(np.array([0, 15, 16, 39, 40, 45])), alone[[0, 15, 16, 39, 40, 45]]) < 1e-5


@pytest.mark.parametrize("file", [None, "program-recurrent.rkf"])
def test_the_limit_of_the_engine_holds(tmp_path, file):
    config = tiny.config(eos_ids=())
    path = VECTORS / file if file else write_model(tmp_path / "m.rkf", config, tiny.weights(config))
    with rkf.open(path) as container:
        backend = TorchBackend(container)
        prompts = [(IDS[n : n + 20] % backend.metadata.vocab_size).tolist() for n in range(4)]
        alone = [run(Engine(backend, kept=0), Recorded(prompt, 30)) for prompt in prompts]
        gc.collect()
        assert backend.held_bytes == 0
        single = backend.new_sequence(backend.metadata.context_length)
        planned = single.growth_bytes(30)
        backend.forward([Row(single, IDS[:30] % backend.metadata.vocab_size)])
        each = backend.held_bytes
        assert single.growth_bytes(0) == 0
        states = each - planned  # of fixed size; as on the CPU, no plan counts them
        assert (states > 0) == bool(file)
        del single
        engine, requests = Engine(backend, memory_bytes=2 * each + each // 2), [Recorded(p, 30) for p in prompts]
        for request in requests:
            engine.submit(request)
        found, most = [[] for _ in requests], 0
        while not all(request.ended for request in requests):
            engine.step()
            most = max(most, backend.held_bytes)
            for tokens, request in zip(found, requests, strict=True):
                tokens += request.take()
        assert found == alone
        assert most >= each
        if not file:
            assert most <= 2 * each + each // 2


@pytest.mark.parametrize("window", [None, 24])
def test_steps_of_standing_buffers_equal_the_decoder(tmp_path, window):
    config = tiny.config(architecture="mistral", sliding_window=window)
    path = write_model(tmp_path / "m.rkf", config, tiny.weights(config), RULES["groups"])
    with rkf.open(path) as container, torch.inference_mode():
        decoder = Decoder.of(container)
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
        sequence = backend.new_sequence(16)
        with pytest.raises(ContextLengthError):
            backend.forward([Row(sequence, IDS[:17])])
        for bad in (np.array([400]), np.array([-1]), np.array([], np.int64)):
            with pytest.raises(UsageError):
                backend.forward([Row(sequence, bad)])
        with pytest.raises(UsageError):
            backend.forward([Row(sequence, IDS[:1]), Row(sequence, IDS[:1])])
        with pytest.raises(UsageError):
            sequence.truncate(1)


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
