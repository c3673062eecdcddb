"""The CPU backend against a plain numpy forward pass: dense and clustered files, token by token and in tiles."""

from dataclasses import replace

import numpy as np
import pytest

import rkf
from rkf.cluster.recipe import Rule
from rkf.errors import BindingError, ContextLengthError, UsageError
from rkf.file.prefix import within
from rkf.file.values import write_values
from rkf.file.writer import Writer
from rkf.format.matrix import Alias, ClusteredMatrix
from rkf.runtime.backend import Row
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
    sequence = backend.new_sequence(CONFIG.context_length)
    return np.concatenate([backend.forward([Row(sequence, part)], "all") for part in parts])


def relative(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def decoded(container):
    return {name: container.decode(name) for name in container.tensors}


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_dense_files_equal_numpy(tmp_path, dtype):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), dtype=dtype)) as container:
        backend = CpuBackend(container, exact=True)
        wanted = logits(NumpyBackend(CONFIG, decoded(container)), [IDS])
        assert relative(logits(backend, PARTS), wanted) < 1e-4


def test_exact_mode_of_a_clustered_file_equals_numpy_on_its_decoded_weights(tmp_path):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), RULE)) as container:
        wanted = logits(NumpyBackend(CONFIG, decoded(container)), [IDS])
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
        wanted = logits(NumpyBackend(CONFIG, weights), [IDS])
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


def test_a_truncated_sequence_continues_as_a_fresh_one(tmp_path):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), RULE)) as container:
        backend = CpuBackend(container)
        sequence = backend.new_sequence(256)
        backend.forward([Row(sequence, IDS[:60])])
        assert (sequence.reusable(30), sequence.reusable(90)) == (30, 60)
        sequence.truncate(30)
        found = backend.forward([Row(sequence, IDS[30:40])])
        assert np.array_equal(found, backend.forward([Row(backend.new_sequence(256), IDS[:40])]))
        assert sequence.length == 40


def test_what_does_not_fit_is_refused(tmp_path):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), RULE)) as container:
        backend = CpuBackend(container)
        sequence, other = backend.new_sequence(16), backend.new_sequence(16)
        with pytest.raises(ContextLengthError):
            backend.forward([Row(other, IDS[:1]), Row(sequence, IDS[:17])])
        for bad in (np.array([400]), np.array([-1]), np.array([], np.int64)):
            with pytest.raises(UsageError):
                backend.forward([Row(other, IDS[:1]), Row(sequence, bad)])
        for rows in ([], [Row(other, IDS[:1]), Row(other, IDS[:1])]):
            with pytest.raises(UsageError, match="each of another sequence"):
                backend.forward(rows)
        for wanted in ([3], [-1], [1, 1], [[0]]):
            with pytest.raises(UsageError, match="ascending places below 3"):
                backend.forward([Row(sequence, IDS[:3])], np.array(wanted))
        with pytest.raises(UsageError):
            sequence.truncate(1)
        assert sequence.length == other.length == 0


@pytest.mark.parametrize("cache_format", ["f32", "int16", "int16-int8", "int8"])
def test_a_sequence_has_the_same_bits_alone_and_in_any_mix(tmp_path, cache_format):
    config = tiny.config(context_length=1024)
    ids = np.random.Generator(np.random.Philox(key=4)).integers(0, 400, (5, 600))
    with rkf.open(write_model(tmp_path / "m.rkf", config, tiny.weights(config), RULE)) as container:
        backend = CpuBackend(container, cache_format=cache_format)
        alone = [backend.forward([Row(backend.new_sequence(600), each)], "all") for each in ids]
        random = np.random.Generator(np.random.Philox(key=5))
        sequences, found = [backend.new_sequence(600) for _ in ids], [[] for _ in ids]
        while any(sequence.length < 600 for sequence in sequences):
            fed = [n for n in random.permutation(5) if sequences[n].length < 600 and random.random() < 0.7]
            if not fed:
                continue
            rows = []
            for n in fed:
                length = sequences[n].length
                rows.append(Row(sequences[n], ids[n, length : length + random.choice([1, 1, 2, 7, 60, 300])]))
            got = backend.forward(rows, "all")
            for n, part in zip(fed, np.split(got, np.cumsum([len(row.tokens) for row in rows])[:-1]), strict=True):
                found[n].append(part)
        assert all(np.array_equal(np.concatenate(parts), wanted) for parts, wanted in zip(found, alone, strict=True))


def test_only_the_wanted_logits_are_given(tmp_path):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), RULE)) as container:
        backend = CpuBackend(container)

        def rows():
            return [Row(backend.new_sequence(200), part) for part in (IDS[:100], IDS[3:4], IDS)]

        every = backend.forward(rows(), "all")
        assert len(every) == 251
        assert np.array_equal(backend.forward(rows()), every[[99, 100, 250]])
        for places in ([], [0], [0, 99, 100], [255 - 10, 250]):
            assert np.array_equal(backend.forward(rows(), np.array(places, np.int64)), every[places])


def test_a_fork_shares_pages_until_one_writes(tmp_path):
    config = tiny.config(context_length=1024)
    ids = np.random.Generator(np.random.Philox(key=6)).integers(0, 400, 700)
    with rkf.open(write_model(tmp_path / "m.rkf", config, tiny.weights(config), RULE)) as container:
        backend = CpuBackend(container)
        first = backend.new_sequence(700)
        backend.forward([Row(first, ids[:300])])
        second = first.fork()
        assert second.length == 300
        whole = backend.forward([Row(first, ids[300:])], "all")
        other = backend.forward([Row(second, ids[:20])], "all")
        fresh = backend.new_sequence(700)
        backend.forward([Row(fresh, ids[:300])])
        assert np.array_equal(backend.forward([Row(fresh, ids[:20])], "all"), other)
        third = first.fork()
        first.truncate(100)  # writes into a page that the others still have
        backend.forward([Row(first, ids[:50])])
        third.truncate(300)
        assert np.array_equal(backend.forward([Row(third, ids[300:])], "all"), whole)


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


def test_hundreds_of_layers_run(tmp_path):
    config = tiny.config(layers=205, hidden_size=16, intermediate_size=16, heads=1, kv_heads=1)
    with rkf.open(write_model(tmp_path / "m.rkf", config, tiny.weights(config))) as container:
        found = logits(CpuBackend(container), np.split(IDS[:8], [4, 5, 6, 7]))
        assert np.array_equal(found, logits(CpuBackend(container, threads=1), [IDS[:8]]))


@pytest.mark.parametrize(("cache_format", "most"), [("int16", 0.005), ("int16-int8", 0.02), ("int8", 0.05)])
def test_a_shorter_cache_is_close(tmp_path, cache_format, most):
    with rkf.open(write_model(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), RULE)) as container:
        wanted = logits(CpuBackend(container, exact=True), PARTS)
        assert relative(logits(CpuBackend(container, cache_format=cache_format), PARTS), wanted) < most
        with pytest.raises(UsageError):
            CpuBackend(container, cache_format="int4")
