"""Matrices behind a Hadamard transform read rounded activations (kernels/packing.py)."""

import numpy as np
import pytest

import rkf
from rkf.cluster.recipe import Rule
from rkf.runtime.backend import Row
from rkf.runtime.cpu import CpuBackend
from tests.runtime import tiny
from tests.runtime.files import write_model

IDS = np.random.Generator(np.random.Philox(key=5)).integers(0, 400, 44)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny.config(hidden_size=160, intermediate_size=288)  # rows that end within a step of the kernels
    rule = Rule(k=16, grid=True, affine="row")
    return write_model(tmp_path_factory.mktemp("rounded") / "m.rkf", config, tiny.weights(config), rule, rotate=True)


def logits(container, parts, **options):
    backend = CpuBackend(container, **options)
    sequence = backend.new_sequence(64)
    return np.concatenate([backend.forward([Row(sequence, part)], "all") for part in parts])


def test_a_prompt_has_the_same_bits_in_one_part_and_token_by_token(model):
    with rkf.open(model) as container:
        whole = logits(container, [IDS])
        assert np.array_equal(whole, logits(container, np.split(IDS, 44)))
        assert np.array_equal(whole, logits(container, [IDS[:3], IDS[3:12], IDS[12:]]))


def test_rounding_stays_near_the_exact_logits(model):
    with rkf.open(model) as container:
        exact = logits(container, [IDS], exact=True)
        error = np.abs(logits(container, [IDS]) - exact)
    # 4e-3 at every matrix, which random weights pass on; 16-bit activations would give 1e-4.
    assert 1e-3 < np.median(error) / np.abs(exact).max() < 2e-2
