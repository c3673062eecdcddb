"""The CPU backend against a plain numpy forward pass: dense and clustered files, token by token and in tiles."""

from dataclasses import replace

import numpy as np
import pytest

import rkf
from rkf.cluster.recipe import Rule
from rkf.errors import BindingError, ContextLengthError, UnsupportedError, UsageError
from rkf.file.prefix import within
from rkf.file.values import write_values
from rkf.file.writer import Writer
from rkf.format.matrix import Alias, ClusteredMatrix
from rkf.runtime.cpu import CpuBackend
from tests.runtime import tiny
from tests.runtime.files import write_model
from tests.runtime.numpy_backend import NumpyBackend

CONFIG = tiny.config()
IDS = np.random.Generator(np.random.Philox(key=3)).integers(0, 400, 150)
PARTS = np.split(IDS, [1, 2, 20, 130, 131])
RULE = Rule(k=16, grid=True, affine="row", exceptions=0.002)
DOWN = "model.layers.0.mlp.down_proj.weight"


def logits(backend, parts):
    cache = backend.new_cache(CONFIG.context_length)
    return np.concatenate([backend.forward(part, cache, last_only=False) for part in parts])


def relative(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def decoded(container):
    return {name: container.decode(name) for name in container.tensors}


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_dense_files_equal_numpy(tmp_path, dtype):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), dtype=dtype)) as container:
        backend = CpuBackend(container, exact=True)
        wanted = logits(NumpyBackend(CONFIG, decoded(container)), PARTS)
        assert relative(logits(backend, PARTS), wanted) < 1e-4


def test_exact_mode_of_a_clustered_file_equals_numpy_on_its_decoded_weights(tmp_path):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), RULE)) as container:
        wanted = logits(NumpyBackend(CONFIG, decoded(container)), PARTS)
        assert relative(logits(CpuBackend(container, exact=True), PARTS), wanted) < 1e-4


@pytest.mark.parametrize("grid", [True, False])
def test_fast_mode_is_close_to_exact(tmp_path, grid):
    rule = Rule(k=32, grid=grid, affine="row", exceptions=0.002)
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), rule)) as container:
        wanted = logits(CpuBackend(container, exact=True), PARTS)
        assert relative(logits(CpuBackend(container), PARTS), wanted) < 5e-3  # the cache holds half-precision numbers


@pytest.mark.parametrize("bits", [1, 4, 5, 6, 8])
def test_fewer_bits_are_the_coarser_matrices(tmp_path, bits):
    rules = {"gate_proj": Rule(k=16, exceptions=0.002), "up_proj": Rule(k=100, grid=True, affine="row")}

    def rule(name):
        return next((rule for part, rule in rules.items() if part in name), Rule(k=64, exceptions=0.002))

    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), rule)) as container:
        matrices = {name: container.load(name) for name in container.tensors}
        weights = {
            name: within(matrix, bits).decode() if isinstance(matrix, ClusteredMatrix) else container.decode(name)
            for name, matrix in matrices.items()
        }
        wanted = logits(NumpyBackend(CONFIG, weights), PARTS)
        assert relative(logits(CpuBackend(container, exact=True, bits=bits), PARTS), wanted) < 1e-4
        assert relative(logits(CpuBackend(container, bits=bits), PARTS), wanted) < 5e-3
        with pytest.raises(UsageError):
            CpuBackend(container, bits=9)


def test_unordered_values_have_no_coarser_model(tmp_path):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), RULE)) as container:
        values = {
            name: container.values(name) for name, entry in container.tensors.items() if entry.kind == "clustered"
        }
        write_values(tmp_path / "u.rkv", container, values, ordered=False)
    refused = pytest.raises(BindingError, match="order")
    with rkf.open(tmp_path / "m.rkf", values=tmp_path / "u.rkv") as container, refused:
        CpuBackend(container, bits=2)


def test_tokens_alone_and_in_tiles_give_the_same_bits(tmp_path):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), RULE)) as container:
        backend = CpuBackend(container)
        alone = logits(backend, np.split(IDS, len(IDS)))
        assert np.array_equal(logits(backend, [IDS]), alone)


def test_a_truncated_cache_continues_as_a_fresh_one(tmp_path):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), RULE)) as container:
        backend = CpuBackend(container)
        cache = backend.new_cache(256)
        backend.forward(IDS[:60], cache, last_only=True)
        cache.truncate(30)
        found = backend.forward(IDS[30:40], cache, last_only=True)
        fresh = backend.new_cache(256)
        assert np.array_equal(found, backend.forward(IDS[:40], fresh, last_only=True))
        assert cache.length == 40


def test_what_does_not_fit_is_refused(tmp_path):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), RULE)) as container:
        backend = CpuBackend(container)
        cache = backend.new_cache(16)
        with pytest.raises(ContextLengthError):
            backend.forward(IDS[:17], cache, last_only=True)
        for bad in (np.array([400]), np.array([-1]), np.array([], np.int64)):
            with pytest.raises(UsageError):
                backend.forward(bad, cache, last_only=True)
        with pytest.raises(UsageError):
            cache.truncate(1)


@pytest.mark.parametrize("cache_format", ["f32", "f16", "int8"])
def test_several_sequences_in_one_pass_give_the_bits_of_each_alone(tmp_path, cache_format):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), RULE)) as container:
        backend = CpuBackend(container, cache_format=cache_format)
        prompts = [IDS[:5], IDS[7:47], IDS[50:51], IDS[60:90], IDS[90:97]]
        caches = [backend.new_cache(256) for _ in prompts]
        alone = [backend.new_cache(256) for _ in prompts]
        for prompt, *pair in zip(prompts, caches, alone, strict=True):
            for cache in pair:
                backend.forward(prompt, cache, last_only=True)
        for step in range(3):
            tokens = IDS[100 + 5 * step : 105 + 5 * step]
            wanted = [backend.forward(tokens[i : i + 1], alone[i], last_only=True)[0] for i in range(5)]
            assert np.array_equal(backend.forward_batch(tokens, caches), wanted)


def test_a_batch_needs_a_cache_for_each_token(tmp_path):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), RULE)) as container:
        backend = CpuBackend(container)
        a, b = backend.new_cache(16), backend.new_cache(16)
        for caches in ([a, a], [a], [a, a, b]):
            with pytest.raises(UsageError):
                backend.forward_batch(IDS[:2], caches)


def test_a_rank_past_the_centroids_under_an_exception_is_some_value(tmp_path):
    """Wrong, as `rkf verify` says, but unsafe to nobody."""
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), Rule(k=9, exceptions=0.002))) as found:
        matrix = found.load(DOWN)
        assert isinstance(matrix, ClusteredMatrix)
        planes = tuple(np.full_like(plane, 255) for plane in matrix.planes)
        with Writer(tmp_path / "bad.rkf", metadata=found.metadata, provenance={}) as writer:
            for name, entry in found.tensors.items():
                bad = replace(matrix, planes=planes) if name == DOWN else None
                writer.add(name, bad or (Alias(entry.target) if entry.target else found.load(name)))
            writer.blob("tokenizer.json", found.blob("tokenizer.json"))
    with rkf.open(tmp_path / "bad.rkf") as container:
        for exact in (False, True):
            assert np.isfinite(logits(CpuBackend(container, exact=exact), PARTS)).all()


def test_as_many_layers_as_phases_can_be_counted(tmp_path):
    """A pass of several tokens counts ten phases a layer; past 2048 the next call would take its own for done."""
    config = tiny.config(layers=205)
    path = write_model(tmp_path / "m.rkf", config, tiny.weights(config))
    with rkf.open(path) as container, pytest.raises(UnsupportedError, match="205 layers are more"):
        CpuBackend(container)


def test_an_int8_cache_is_close(tmp_path):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), RULE)) as container:
        wanted = logits(CpuBackend(container, exact=True), PARTS)
        assert relative(logits(CpuBackend(container, cache_format="int8"), PARTS), wanted) < 0.05
        with pytest.raises(UsageError):
            CpuBackend(container, cache_format="int4")
