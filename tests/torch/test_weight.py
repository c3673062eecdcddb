"""Decoding in torch against ClusteredMatrix.decode, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rkf.torch import ClusteredWeight
from tests.runtime.matrices import random_matrix

SHAPES = [(1, 1), (5, 7), (9, 63), (6, 65), (40, 96)]
FORMS = [
    {"affine": "none"},
    {"affine": "tensor"},
    {"affine": "row"},
    {"affine": "both", "exceptions": 1},
    {"affine": 32, "exceptions": 1},
    {"affine": "row", "tables": 3, "exceptions": 1},
]


@pytest.mark.parametrize("k", [2, 3, 8, 16, 24, 64, 100, 256])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_decodes_the_same_bits(k, form):
    for shape in SHAPES:
        tables = min(form.get("tables", 1), shape[0])
        matrix = random_matrix(k, *shape, grid=False, **{**form, "tables": tables})
        weight, expected = ClusteredWeight(matrix), matrix.decode()
        with torch.no_grad():
            assert np.array_equal(weight().numpy().view(np.uint32), expected.view(np.uint32))
            rows = torch.arange(shape[0]).flip(0).repeat(2)
            assert np.array_equal(weight.gather(rows).numpy(), expected[rows.numpy()])


def test_exceptions_land_in_their_tile():
    matrix = random_matrix(16, 50, 40, exceptions=300)
    weight, expected = ClusteredWeight(matrix), matrix.decode()
    with torch.no_grad():
        for first, last in [(0, 1), (7, 31), (49, 50), (0, 50)]:
            assert np.array_equal(weight.decode(first, last).numpy(), expected[first:last])
        rows = torch.tensor([3, 49, 3, 0])
        assert np.array_equal(weight.gather(rows).numpy(), expected[rows.numpy()])


@pytest.mark.parametrize("tables", [1, 3, 6])
@pytest.mark.parametrize("affine", ["none", "tensor", "row", 32])
def test_a_stack_decodes_matrix_by_matrix(tables, affine):
    matrix = random_matrix(16, 18, 40, tables=tables, affine=affine, exceptions=60)
    matrix = replace(matrix, shape=(3, 6, 40))
    weight, expected = ClusteredWeight(matrix), matrix.decode()
    with torch.no_grad():
        assert np.array_equal(weight().numpy(), expected)
        for number in range(3):
            assert np.array_equal(weight.decode(6 * number, 6 * number + 6).numpy(), expected[number])


def test_ranks_are_state_and_values_are_parameters():
    weight = ClusteredWeight(random_matrix(24, 8, 20, affine="both", exceptions=5))
    assert {name for name, _ in weight.named_parameters()} == {"centroids", "a", "b"}
    assert {name for name, _ in weight.named_buffers()} == {"plane0", "plane1", "positions", "exceptions"}
    other = ClusteredWeight(random_matrix(24, 8, 20, affine="both", exceptions=5, seed=1))
    other.load_state_dict(weight.state_dict())
    assert torch.equal(other(), weight())


def test_an_index_past_k_reads_padding():
    matrix = random_matrix(3, 4, 8, affine="none")
    for plane in matrix.planes:
        plane[...] = 0xFF
    assert torch.equal(ClusteredWeight(matrix)(), torch.zeros(4, 8))
