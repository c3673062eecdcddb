"""Matrices behind a Hadamard transform read rounded activations (kernels/packing.py)."""

import ctypes

import numpy as np
import pytest

import rkf
from rkf.cluster.recipe import Rule
from rkf.runtime import cpu_features, jit
from rkf.runtime.backend import Row
from rkf.runtime.buffers import Buffers
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.matrices import Memory
from rkf.runtime.structs import ACTIVATION, ACTIVATION_LIMIT, PACK, ROUNDED, ROUNDED_LIMIT, THREAD
from tests.runtime import tiny
from tests.runtime.files import write_model
from tests.runtime.matrices import WORK, packed

HOST = cpu_features.host_features()
IDS = np.random.Generator(np.random.Philox(key=5)).integers(0, 400, 44)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny.config(hidden_size=160, intermediate_size=288)  # rows that end within a step of the kernels
    rule = Rule(k=16, grid=True, affine="row")
    return write_model(tmp_path_factory.mktemp("rounded") / "m.rkf", config, tiny.weights(config), rule, rotate=True)


@pytest.mark.parametrize("level", [name for name, needs in cpu_features.LEVELS.items() if needs <= HOST])
def test_every_level_packs_the_same_multiples(level):
    columns = 288
    values = np.random.Generator(np.random.Philox(key=1)).standard_normal((1, columns)).astype(np.float32)
    values[0, 32:64] *= 0.01  # few multiples in a block of small values
    memory = Memory()
    buffers = Buffers(memory)
    place = buffers.value("x", columns, private=False)
    memory.copy(values, place.address)
    activation, _ = buffers.activation(place, columns, private=False, rounded=True)
    pack, thread = np.zeros(1, PACK), np.zeros(1, THREAD)
    pack["activation"], pack["rows"] = activation, 1
    address = jit.addresses(["pack:rounded"], level)["pack:rounded"]
    WORK(address)(0, pack.ctypes.data, 0, thread.ctypes.data)

    inverse = np.float32(1) / (np.abs(values).max() / np.float32(ACTIVATION_LIMIT))
    largest = np.abs(values).reshape(-1, ROUNDED).max(axis=1)
    multiples = (largest * inverse * np.float32(1 / ROUNDED_LIMIT)).astype(np.int64) + 1
    factors = np.repeat(inverse / multiples.astype(np.float32), ROUNDED)
    integers = np.rint(values.astype(np.float64) * factors).astype(np.int64) * np.repeat(multiples, ROUNDED)
    wanted = packed(integers, level)
    found = np.ctypeslib.as_array((ctypes.c_uint8 * wanted.size).from_address(activation_packed(activation)))
    assert np.array_equal(found, wanted[0])


def activation_packed(address):
    """Where an ACTIVATION's packed rows are."""
    struct = np.frombuffer((ctypes.c_uint8 * ACTIVATION.itemsize).from_address(address), ACTIVATION)
    return int(struct["packed"][0])


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
