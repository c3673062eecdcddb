"""Losses of single matrices against the divergence of whole models, one sequence at a time."""

import numpy as np
import pytest

from rkf.calibrate import divergences, passes, sensitivity
from rkf.calibrate.passes import TensorReader
from tests.calibrate.test_calibration import ALIASES, oracle
from tests.runtime import tiny

TOKENS = np.random.Generator(np.random.Philox(1)).integers(0, tiny.config().vocab_size, (43, 60)).astype(np.uint32)
MEASURED = [0, 21, 42]
LAYER = "model.layers.{}.mlp.down_proj.weight"


def coarse(weights, moments):
    """A step of 0.01, whatever the inputs: small enough for the second-order term."""
    return (np.round(weights * 100) / 100).astype(np.float32)


def divergence(config, weights, changed):
    whole, other = (oracle(config, w, TOKENS[MEASURED])[:, -48:].astype(np.float64) for w in (weights, changed))
    log_p, log_q = (x - x.max(-1, keepdims=True) for x in (whole, other))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_p, log_q))
    found = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return np.mean(np.sqrt(found)) ** 2


def test_losses_are_divergences():
    config = tiny.config()
    weights = tiny.weights(config)
    found = sensitivity.losses(config.program(weights), TensorReader(weights.__getitem__, ALIASES), coarse, TOKENS)
    clustered = [name for name, w in weights.items() if w.ndim == 2]
    assert sorted(found) == sorted(clustered)
    for name in clustered:
        expected = divergence(config, weights, {**weights, name: coarse(weights[name], None)})
        assert found[name] == pytest.approx(expected, rel=0.35), name


def test_losses_do_not_depend_on_threads(monkeypatch):
    config = tiny.config()
    weights = tiny.weights(config)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(passes, "workers", lambda threads=threads: threads)
        monkeypatch.setattr(sensitivity, "workers", lambda threads=threads: threads)
        reader = TensorReader(weights.__getitem__, ALIASES)
        found.append(sensitivity.losses(config.program(weights), reader, coarse, TOKENS))
    assert found[0] == found[1]


def test_losses_that_are_not_followed_to_the_end_are_close(monkeypatch):
    config = tiny.config(layers=11)
    weights = tiny.weights(config)
    program, reader = config.program(weights), TensorReader(weights.__getitem__, ALIASES)
    found = sensitivity.losses(program, reader, coarse, TOKENS)
    monkeypatch.setattr(divergences, "_EVERY", 1)
    whole = sensitivity.losses(program, reader, coarse, TOKENS)
    assert found.keys() == whole.keys()
    equal = {layer for layer in range(11) if found[LAYER.format(layer)] == whole[LAYER.format(layer)]}
    assert equal == {0, 1, 6, 9, 10}
    for name, loss in found.items():
        assert loss == pytest.approx(whole[name], rel=0.45), name
