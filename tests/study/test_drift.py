"""Drift: the measured residual stream, and the quantities that each correction preserves."""

import json
from dataclasses import replace

import numpy as np
import pytest

import rkf
from rkf.cluster.recipe import Rule
from rkf.eval import reference
from rkf.study import study, trace
from rkf.study.changes import moments
from rkf.study.drift import _clear, ordered, steps, survivors
from rkf.study.subject import clustered_in_layers
from tests.calibrate.small_models import small_model
from tests.study.conftest import CONFIG
from tests.torch.program_files import write_program


def values_file(folder, correction):
    return folder / "values" / f"order-first_correction-{correction}_replaced-2_seed-0.rkv"


def test_the_stream_followed_is_the_models(model):
    ids = np.arange(20)
    with rkf.open(model) as container, rkf.load(model, exact=True) as ready:
        states = trace.residual_stream(container, ids, threads=1)
        assert [state.shape for state in states] == [(20, CONFIG.hidden_size)] * CONFIG.layers
        normed = states[-1] / np.sqrt((states[-1] ** 2).mean(axis=1, keepdims=True) + CONFIG.norm_epsilon)
        normed *= container.decode("model.norm.weight")
        np.testing.assert_allclose(normed @ container.decode("lm_head.weight").T, ready.logits(ids), atol=1e-4)


def test_moments_are_restored(model, studied):
    with rkf.open(model) as old, rkf.open(model, values=values_file(studied("drift"), "moments")) as new:
        for name in clustered_in_layers(old):
            before, after = (c.values(name).centroids[0].astype(np.float64) for c in (old, new))
            assert not np.array_equal(before, after)
            counts = old.counts(name)[0]
            np.testing.assert_allclose(moments(after, counts), moments(before, counts), rtol=1e-5, atol=1e-7)


def test_the_scale_of_outputs_is_restored(model, studied):
    folder, inputs = studied("drift"), {}
    (predictions,) = folder.glob("reference-*.kld")
    ids = reference.read(predictions)[0].ids
    with rkf.open(model) as old, rkf.open(model, values=values_file(folder, "output")) as new:
        trace.residual_stream(old, ids, threads=1, seen=inputs.__setitem__)
        assert set(inputs) == set(clustered_in_layers(old))
        for name, x in inputs.items():
            before, after = (np.linalg.norm(x @ replace(c.load(name), exceptions=None).decode().T) for c in (old, new))
            assert after == pytest.approx(before, rel=1e-4)


def test_the_profile_tells_scale_from_order():
    random = np.random.Generator(np.random.Philox(key=0))
    x = random.standard_normal((5, 64)).astype(np.float32)
    found = trace.compared([3 * x, np.exp(x), -x], [x, x, x])
    np.testing.assert_allclose(found["scale"], [3, np.exp(np.log(rms(np.exp(x)) / rms(x)).mean()), 1], rtol=1e-5)
    np.testing.assert_allclose(found["spearman"], [1, 1, -1])


def rms(x):
    return np.sqrt((x.astype(np.float64) ** 2).mean(axis=1))


def test_layers_are_replaced_in_the_order_named():
    layers = [0, 1, 2, 3, 4]
    assert steps(30) == [1, 3, 7, 15, 30] and steps(1) == [1]
    assert ordered(layers, "first", 0) == layers and ordered(layers, "last", 0) == layers[::-1]
    assert sorted(ordered(layers, "random", 0)) == layers != ordered(layers, "random", 0)


def test_survivors_end_at_the_first_doubling():
    rows = [
        {"order": "last", "correction": "none", "seed": 0, "replaced": count, "ppl_ratio": ratio}
        for count, ratio in ((1, 1.1), (3, 1.9), (7, 2.5), (15, 1.2))
    ]
    found = {(row["order"], row["correction"]): row["survive"] for row in survivors(rows)}
    assert found == {("last", "none"): 3}  # no entry for combinations that were not tried


def test_an_order_ends_where_the_model_is_lost(studied):
    rows = json.loads((studied("drift") / "results.json").read_text())["trials"]
    assert {row["replaced"] for row in rows} == {1, 2}
    assert all(("profile" in row) == (row["replaced"] == CONFIG.layers) for row in rows)
    factors = {"order": "first", "correction": "none", "seed": 0, "replaced": 3}
    assert _clear(factors, [{**factors, "replaced": 1, "ppl_ratio": 11.0}])
    assert not _clear(factors, [{**factors, "replaced": 1, "ppl_ratio": 9.0}, {**factors, "ppl_ratio": 11.0}])


def test_stacks_of_experts_are_replaced_too(tmp_path):
    """A table an expert; their outputs are left alone, as each expert sees few tokens."""
    _, program, weights = small_model("qwen3_moe")
    path = write_program(tmp_path / "m.rkf", program, weights, lambda name, shape: Rule(k=8, rows_per_table=shape[-2]))
    words = np.random.Generator(np.random.Philox(key=1)).integers(3, 64, 100)
    text = " ".join(f"t{word}" for word in words)
    rows = study("drift", path, tmp_path / "out", text=text, seeds=1, layers=[2], windows=1, ctx=32, threads=1)
    assert {row["correction"] for row in rows} == {"none", "mean", "moments", "output"}
    changed = tmp_path / "out" / "values" / "order-first_correction-output_replaced-1_seed-0.rkv"
    with rkf.open(path) as old, rkf.open(path, values=changed) as new:
        for name, (layer, role) in clustered_in_layers(old).items():
            before, after = old.values(name).centroids, new.values(name).centroids
            assert np.array_equal(before, after) == (layer != 2)
            assert before.shape[0] == (4 if role.startswith("expert_") else 1)
