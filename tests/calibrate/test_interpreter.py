"""The interpreter of programs against transformers, at once and in chunks."""

import numpy as np
import pytest
import torch

from rkf.calibrate.batch_cache import BatchCache
from rkf.calibrate.interpreter import Flow, Stretch, logits
from rkf.model.rotation import rotated, rotations, unrotated
from rkf.numbers.hadamard_blocks import transformed
from tests.calibrate.small_models import OPTIONS, small_model

TOKENS = np.random.Generator(np.random.Philox(1)).integers(3, 64, (3, 24))


def run(program, weights, ids, cache=None, tap=None, positions=64):
    """Logits f32[batch, tokens, vocab]."""
    flow = Stretch.stem(program, positions)(weights, Flow(ids), cache, tap)
    for number in range(program.layers):
        flow = Stretch.of_layer(program, number, positions)(weights, flow, cache, tap)
    flow = Stretch.top(program, positions)(weights, flow, cache, tap)
    if cache is not None:
        cache.advance(ids.shape[1])
    x = flow.values[program.logits.src]
    op = program.logits
    out = logits(op, x.reshape(-1, x.shape[-1]), weights[op.weight], None if op.bias is None else weights[op.bias])
    return out.reshape(*ids.shape, -1)


@pytest.fixture(scope="module", params=OPTIONS)
def small(request):
    model, program, weights = small_model(request.param)
    with torch.no_grad():
        return program, weights, model(torch.tensor(TOKENS)).logits.numpy()


def test_logits_are_those_of_transformers(small):
    program, weights, expected = small
    np.testing.assert_allclose(run(program, weights, TOKENS), expected, atol=1e-5 * np.abs(expected).max())


def test_a_rotated_program_is_the_same_model(small):
    program, weights, expected = small
    turned = rotated(program, {})
    assert unrotated(turned) == program
    blocks = rotations(turned)
    assert len(blocks) > 2 * program.layers
    changed = {name: transformed(weights[name], block) for name, block in blocks.items()}
    found = run(turned, weights | changed, TOKENS)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


class Unrounded(BatchCache):
    """Keys and values in f32, so that chunks can be compared with the whole."""

    def __init__(self):
        self.length, self.states, self._kept = 0, {}, {}

    def extend(self, layer, keys, values):
        kept = self._kept.get(layer)
        if kept is not None:
            keys, values = np.concatenate([kept[0], keys], axis=2), np.concatenate([kept[1], values], axis=2)
        self._kept[layer] = keys, values
        return self._kept[layer]

    def read(self, layer, tokens):
        return self._kept[layer]


@pytest.mark.parametrize("sizes", [[1] * 24, [7, 1, 11, 5]], ids=["token by token", "chunks"])
def test_chunks_with_a_past_give_the_same(small, sizes):
    program, weights, expected = small
    ends = np.cumsum(sizes)
    cache = Unrounded()
    parts = [run(program, weights, TOKENS[:, end - size : end], cache) for size, end in zip(sizes, ends, strict=True)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-5 * np.abs(expected).max())
