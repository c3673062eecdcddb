"""Passes over batches, layer by layer, against the oracle that runs one sequence at a time."""

import numpy as np
import pytest

from rkf.calibrate import narrow, passes
from rkf.calibrate.layers import KeyValues, Layer, rms_norm
from rkf.errors import OutputError
from rkf.format.matrix import from_f32, to_f32
from rkf.runtime.backend import Row
from tests.runtime import tiny
from tests.runtime.numpy_backend import NumpyBackend

CONFIG = tiny.config()
WEIGHTS = tiny.weights(CONFIG)
TOKENS = np.random.Generator(np.random.Philox(1)).integers(0, CONFIG.vocab_size, (11, 20)).astype(np.uint32)


def layer(config, weights, number):
    prefix = f"model.layers.{number}."
    return Layer(config, {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)})


def logits(config, weights, x):
    h = rms_norm(x, weights["model.norm.weight"], config.norm_epsilon)
    return h @ weights["model.embed_tokens.weight"].T


def oracle(config, weights, tokens):
    backend = NumpyBackend(config, weights)
    return np.stack([backend.forward([Row(backend.new_sequence(64), row.astype(np.int64))], "all") for row in tokens])


def with_extras():
    """A model with the biases of qwen2 and the norms of qwen3."""
    random = np.random.Generator(np.random.Philox(2))
    weights = dict(WEIGHTS)
    kinds = ("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias")
    for name, shape, _ in CONFIG.tensors():
        if name.endswith(kinds):
            weights[name] = (1 + 0.3 * random.standard_normal(shape)).astype(np.float32)
    return weights


@pytest.mark.parametrize("weights", [WEIGHTS, with_extras()], ids=["llama", "biases and norms"])
def test_layers_equal_the_oracle_at_once_and_token_by_token(weights):
    whole = steps = weights["model.embed_tokens.weight"][TOKENS]
    for number, past in enumerate(KeyValues.of_layers(CONFIG, *TOKENS.shape)):
        one = layer(CONFIG, weights, number)
        whole = one(whole)
        steps = np.concatenate([one(steps[:, [t]], past) for t in range(TOKENS.shape[1])], axis=1)
    expected = oracle(CONFIG, weights, TOKENS)
    np.testing.assert_allclose(logits(CONFIG, weights, whole), expected, atol=1e-4)
    by_steps = logits(CONFIG, weights, steps)  # keys and values of the past are bf16
    assert np.std(by_steps - expected) < 0.01 * np.std(expected)


def test_a_sliding_window_hides_what_is_further_back():
    narrow = tiny.config(sliding_window=4)
    x = WEIGHTS["model.embed_tokens.weight"][TOKENS]
    changed = x.copy()
    changed[:, 3] += 1
    one = layer(narrow, WEIGHTS, 0)
    same = np.isclose(one(x), one(changed), atol=1e-6).all(axis=(0, 2))
    assert np.flatnonzero(~same).tolist() == [3, 4, 5, 6]


def test_moments_are_those_of_the_inputs():
    found = list(passes.moments(CONFIG, WEIGHTS.get, TOKENS))
    assert len(found) == CONFIG.layers + 1
    x = WEIGHTS["model.embed_tokens.weight"][TOKENS]
    for number, moments in enumerate(found[:-1]):
        inputs = {}
        x = layer(CONFIG, WEIGHTS, number)(x, tap=inputs.__setitem__)
        assert set(moments) == {
            f"model.layers.{number}.{name}.weight" for names in passes.SHARED_INPUTS for name in names
        }
        for names in passes.SHARED_INPUTS:
            flat = inputs[names[0]].reshape(TOKENS.size, -1).astype(np.float64)
            for name in names:
                got = moments[f"model.layers.{number}.{name}.weight"]
                np.testing.assert_allclose(got, flat.T @ flat / TOKENS.size, rtol=1e-3, atol=1e-5)
    last = rms_norm(x, WEIGHTS["model.norm.weight"], CONFIG.norm_epsilon).reshape(TOKENS.size, -1)
    np.testing.assert_allclose(found[-1]["lm_head.weight"], last.T @ last / TOKENS.size, rtol=1e-3, atol=1e-5)


def test_text_is_drawn_from_the_models_distribution():
    prompts = [[1]] * 400
    text = passes.write_text(CONFIG, WEIGHTS.get, prompts, ctx=2)
    expected = oracle(CONFIG, WEIGHTS, np.array([[1]]))[0, 0].astype(np.float64)
    expected = np.exp(expected - expected.max())
    expected /= expected.sum()
    likely = np.argsort(-expected)[:20]
    shares = np.bincount(text[:, 1], minlength=CONFIG.vocab_size) / 400
    assert abs(shares[likely].sum() - expected[likely].sum()) < 4 * np.sqrt(0.25 / 400)


def test_kept_matrices_are_rounded_to_bf16(monkeypatch, tmp_path):
    monkeypatch.setattr(narrow, "_TILE", 100)  # several tiles, the last one short
    random = np.random.Generator(np.random.Philox(4))
    weights, x = random.standard_normal((17, 30), np.float32), random.standard_normal((5, 30), np.float32)
    rounded = to_f32(from_f32(weights, "bf16"), "bf16")
    with narrow.mapped(tmp_path) as keep:
        for kept in (narrow.Narrow.of(weights), *(keep(each) for each in (weights, weights))):
            np.testing.assert_array_equal(kept[np.array([[3], [16]])], rounded[[[3], [16]]])
            np.testing.assert_allclose(narrow.product(x, kept), x @ rounded.T, rtol=1e-5, atol=1e-5)
        assert not list(tmp_path.iterdir())
        mapped = passes.write_text(CONFIG, WEIGHTS.get, [[1], [2]], ctx=9, keep=keep)
    np.testing.assert_array_equal(mapped, passes.write_text(CONFIG, WEIGHTS.get, [[1], [2]], ctx=9))
    with pytest.raises(OutputError, match="missing"), narrow.mapped(tmp_path / "missing"):
        pass


def test_text_keeps_its_prompts_and_does_not_depend_on_threads(monkeypatch):
    prompts = [[1], [5, 6, 7], *[[1]] * 9, list(range(30))]
    texts = []
    for threads in (1, 3):
        monkeypatch.setattr(passes, "workers", lambda threads=threads: threads)
        texts.append(passes.write_text(CONFIG, WEIGHTS.get, prompts, ctx=12, seed=3))
    np.testing.assert_array_equal(*texts)
    assert texts[0][1, :3].tolist() == [5, 6, 7]
    assert texts[0][-1].tolist() == list(range(12))
    assert len({tuple(row) for row in texts[0]}) == len(prompts)
    assert not np.array_equal(texts[0], passes.write_text(CONFIG, WEIGHTS.get, prompts, ctx=12, seed=4))
