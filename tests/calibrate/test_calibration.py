"""Passes over batches, layer by layer, against the oracle that runs one sequence at a time."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rkf.calibrate import passes
from rkf.calibrate.batch_cache import BatchCache
from rkf.calibrate.interpreter import Flow, Stretch, logits
from rkf.calibrate.moments import _Mean
from rkf.calibrate.passes import TensorReader, stretches
from rkf.model.roles import shared_inputs
from rkf.runtime.backend import Row
from tests.calibrate.small_models import small_model
from tests.format.first_form_metadata import shapes_of
from tests.runtime import tiny
from tests.runtime.numpy_backend import NumpyBackend

CONFIG = tiny.config()
WEIGHTS = tiny.weights(CONFIG)
ALIASES = {"lm_head.weight": "model.embed_tokens.weight"}
PROGRAM = CONFIG.program(WEIGHTS)
READER = TensorReader(WEIGHTS.__getitem__, ALIASES)
TOKENS = np.random.Generator(np.random.Philox(1)).integers(0, CONFIG.vocab_size, (11, 20)).astype(np.uint32)


def states(program, weights, ids, cache=None):
    """The flow after each stretch. weights: of a stretch."""
    flow = Flow(ids)
    for stretch in stretches(program, 64):
        flow = stretch(weights(stretch), flow, cache)
        yield flow
    if cache is not None:
        cache.advance(ids.shape[1])


def predicted(program, reader, ids, cache=None):
    """Logits f32[batch, tokens, vocab]."""
    *_, last = states(program, reader.of, ids, cache)
    x = last.values[program.logits.src]
    return logits(program.logits, x.reshape(-1, x.shape[-1]), reader(program.logits.weight)).reshape(*ids.shape, -1)


def oracle(config, weights, tokens):
    backend = NumpyBackend(config, weights)
    return np.stack([backend.forward([Row(backend.new_sequence(64), row.astype(np.int64))], "all") for row in tokens])


def with_extras():
    """A model with the biases of qwen2 and the norms of qwen3."""
    random = np.random.Generator(np.random.Philox(2))
    weights = dict(WEIGHTS)
    kinds = ("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias")
    for name, shape in shapes_of(CONFIG, optional=True).items():
        if name.endswith(kinds):
            weights[name] = (1 + 0.3 * random.standard_normal(shape)).astype(np.float32)
    return weights


@pytest.mark.parametrize("weights", [WEIGHTS, with_extras()], ids=["llama", "biases and norms"])
def test_layers_equal_the_oracle_at_once_and_token_by_token(weights):
    program, reader = CONFIG.program(weights), TensorReader(weights.__getitem__, ALIASES)
    cache = BatchCache(program, *TOKENS.shape)
    steps = [predicted(program, reader, TOKENS[:, [t]], cache) for t in range(TOKENS.shape[1])]
    expected = oracle(CONFIG, weights, TOKENS)
    np.testing.assert_allclose(predicted(program, reader, TOKENS), expected, atol=1e-4)
    by_steps = np.concatenate(steps, axis=1)  # keys and values of the past are bf16
    assert np.std(by_steps - expected) < 0.01 * np.std(expected)


def test_a_sliding_window_hides_what_is_further_back():
    program = tiny.config(sliding_window=4).program(WEIGHTS)
    layer = Stretch.of_layer(program, 0, 64)
    x = WEIGHTS["model.embed_tokens.weight"][TOKENS]
    changed = x.copy()
    changed[:, 3] += 1
    one, other = (layer(READER.of(layer), Flow(TOKENS, {"x": each})).values["x"] for each in (x, changed))
    same = np.isclose(one, other, atol=1e-6).all(axis=(0, 2))
    assert np.flatnonzero(~same).tolist() == [3, 4, 5, 6]


def shrunk(total, tokens):
    """The second moments from their sum over some tokens: the fewer, the nearer to a multiple of the identity."""
    return (total + np.eye(len(total)) * np.trace(total) / 2 / tokens) / tokens


def near(found, expected):
    """Whether a product is right but for rounding to eight bits."""
    return np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_moments_are_those_of_the_inputs():
    found = list(passes.moments(PROGRAM, READER, TOKENS))
    assert len(found) == CONFIG.layers + 1
    before = list(states(PROGRAM, READER.rounded, TOKENS))
    for number, (moments, flow) in enumerate(zip(found[:-1], before, strict=False)):
        layer, inputs = Stretch.of_layer(PROGRAM, number, 64), {}
        layer(
            READER.rounded(layer),
            flow,
            tap=lambda seen, inputs=inputs: inputs.update(dict.fromkeys(seen.names, seen.x)),
        )
        groups = shared_inputs(PROGRAM.layer(number)).values()
        assert set(moments) == set(inputs) == {f"model.layers.{number}.{name}" for group in groups for name in group}
        for name, x in inputs.items():
            flat = x.astype(np.float64)
            assert near(moments[name], shrunk(flat.T @ flat, TOKENS.size))
    last = before[-1].values["h"].reshape(TOKENS.size, -1)
    assert near(found[-1]["lm_head.weight"], shrunk(last.T @ last, TOKENS.size))


def test_moments_with_a_loud_token():
    x = np.random.Generator(np.random.Philox(3)).standard_normal((4, 300, 700), np.float32)
    x[:, 0] *= 1000
    mean = _Mean(700)
    with ThreadPoolExecutor(2) as pool:
        mean.add(pool, x[:3])
        mean.add(pool, x[3:])
        found = mean.finished(pool)
    flat = x.reshape(-1, 700).astype(np.float64)
    expected = shrunk(flat.T @ flat, len(flat))
    assert near(found, expected)
    quiet = np.linalg.svd(flat[::300])[2][4:]  # directions in which no loud token points
    assert near(quiet @ found @ quiet.T, quiet @ expected @ quiet.T)


def test_moments_of_experts_are_those_of_the_tokens_that_came_to_them():
    _, program, weights = small_model("qwen3_moe")
    reader, tokens = TensorReader(weights.__getitem__), TOKENS % 64
    found = {}
    for moments in passes.moments(program, reader, tokens):
        found |= moments
    stack = found["model.layers.0.mlp.experts.gate"]
    assert stack is found["model.layers.0.mlp.experts.up"]
    assert stack.counts.sum() == tokens.size * 2
    layer = Stretch.of_layer(program, 0, 64)
    seen = []
    layer(reader.rounded(layer), next(states(program, reader.rounded, tokens)), tap=seen.append)
    for each in seen:
        if each.expert is not None:
            x, moments = each.inputs().astype(np.float64), found[each.names[0]]
            assert moments.counts[each.expert] == each.tokens == len(x)
            assert near(moments.of(each.expert), shrunk(x.T @ x, len(x)))


def test_text_is_drawn_from_the_models_distribution():
    prompts = [[1]] * 400
    text = passes.write_text(PROGRAM, READER, prompts, ctx=2)
    expected = oracle(CONFIG, WEIGHTS, np.array([[1]]))[0, 0].astype(np.float64)
    expected = np.exp(expected - expected.max())
    expected /= expected.sum()
    likely = np.argsort(-expected)[:20]
    shares = np.bincount(text[:, 1], minlength=CONFIG.vocab_size) / 400
    assert abs(shares[likely].sum() - expected[likely].sum()) < 4 * np.sqrt(0.25 / 400)


def test_text_keeps_its_prompts_and_does_not_depend_on_threads(monkeypatch):
    prompts = [[1], [5, 6, 7], *[[1]] * 9, list(range(30))]
    texts = []
    for threads in (1, 3):
        monkeypatch.setattr(passes, "workers", lambda threads=threads: threads)
        texts.append(passes.write_text(PROGRAM, READER, prompts, ctx=12, seed=3))
    np.testing.assert_array_equal(*texts)
    assert texts[0][1, :3].tolist() == [5, 6, 7]
    assert texts[0][-1].tolist() == list(range(12))
    assert len({tuple(row) for row in texts[0]}) == len(prompts)
    assert not np.array_equal(texts[0], passes.write_text(PROGRAM, READER, prompts, ctx=12, seed=4))
