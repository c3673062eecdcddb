"""Clustered layers against dense ones of the same weights: values, gradients, dtypes."""

from dataclasses import replace

import pytest
import torch

from rkf.torch import ClusteredEmbedding, ClusteredLinear, ClusteredStack, clustered_layers
from tests.runtime.matrices import random_matrix

FORMS = [
    {"affine": "none"},
    {"affine": "tensor", "exceptions": 3},
    {"affine": "both", "exceptions": 9},
    {"affine": 32, "exceptions": 9},
    {"affine": "row", "tables": 3, "exceptions": 9},
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(clustered_layers, "_TILE_WEIGHTS", 128)  # so that a small matrix has several


def whole(weight):
    """The matrix in a form that torch's autograd can differentiate: a plain gather over plain indices."""
    index = weight.ranks(slice(None)).long()
    tables = torch.arange(weight.rows) // weight.rows_per_table
    dense = weight.centroids[tables[:, None], index]
    for factor, apply in ((weight.a, torch.mul), (weight.b, torch.add)):
        if factor is not None:
            dense = apply(dense, spread(factor, weight))
    mask = torch.zeros(dense.numel(), dtype=torch.bool)
    mask[weight.positions] = True
    exact = torch.zeros(dense.numel(), dtype=dense.dtype)
    exact[weight.positions] = weight.exceptions
    return torch.where(mask.view_as(dense), exact.view_as(dense), dense)


def spread(factor, weight):
    if factor.ndim == 1:
        return factor[:, None]
    return factor[:, torch.arange(weight.columns) // weight.group]


def gradients(y, direction, *wanted):
    return torch.autograd.grad((y * direction).sum(), wanted)


def close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def learned(weight):
    return [value for value in weight.values if value is not None]


@pytest.mark.parametrize("k", [2, 16, 24, 256])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_linear_and_its_gradients_equal_a_dense_one(k, form):
    torch.manual_seed(0)
    layer = ClusteredLinear(random_matrix(k, 23, 37, grid=False, **form), torch.randn(23)).double()
    x = torch.randn(2, 5, 37, dtype=torch.float64, requires_grad=True)
    wanted = [x, *learned(layer.weight), layer.bias]
    y, expected = layer(x), torch.nn.functional.linear(x, whole(layer.weight), layer.bias)
    direction = torch.randn_like(y)
    close([y], [expected])
    close(gradients(y, direction, *wanted), gradients(expected, direction, *wanted))


@pytest.mark.parametrize("form", [*FORMS[:-1], {"affine": "row", "tables": 4, "exceptions": 9}], ids=str)
def test_one_of_a_stack_and_its_gradients_equal_a_dense_one(form):
    torch.manual_seed(0)
    matrix = replace(random_matrix(16, 24, 37, grid=False, **form), shape=(4, 6, 37))
    layer = ClusteredStack(matrix).double()
    x = torch.randn(2, 5, 37, dtype=torch.float64, requires_grad=True)
    wanted = [x, *learned(layer.weight)]
    for number in range(4):
        y, expected = layer(x, number), x @ whole(layer.weight)[6 * number : 6 * number + 6].T
        direction = torch.randn_like(y)
        close([y], [expected])
        close(gradients(y, direction, *wanted), gradients(expected, direction, *wanted))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_embedding_and_its_gradients_equal_a_dense_one(form):
    torch.manual_seed(0)
    layer = ClusteredEmbedding(random_matrix(16, 23, 37, grid=False, **form)).double()
    ids = torch.randint(0, 23, (3, 11))
    wanted = learned(layer.weight)
    y, expected = layer(ids), torch.nn.functional.embedding(ids, whole(layer.weight))
    direction = torch.randn_like(y)
    close([y], [expected])
    close(gradients(y, direction, *wanted), gradients(expected, direction, *wanted))


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    layer = ClusteredLinear(random_matrix(4, 6, 9, grid=False, affine="both", exceptions=2)).double()
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    names = ("weight.centroids", "weight.a", "weight.b")

    def product(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    values = [value.detach().clone().requires_grad_() for value in layer.weight.values]
    assert torch.autograd.gradcheck(product, (x, *values))


def test_frozen_values_get_no_gradient():
    layer = ClusteredLinear(random_matrix(16, 23, 37, affine="row"))
    layer.weight.a.requires_grad_(False)
    layer(torch.randn(4, 37)).sum().backward()
    assert layer.weight.a.grad is None
    assert layer.weight.centroids.grad is not None


def test_tied_layers_share_their_values():
    embedding = ClusteredEmbedding(random_matrix(16, 23, 37))
    head = ClusteredLinear(embedding.weight)
    head(embedding(torch.arange(5))).sum().backward()
    both = embedding.weight.centroids.grad.clone()
    embedding.zero_grad()
    head(embedding(torch.arange(5)).detach()).sum().backward()
    assert not torch.equal(both, embedding.weight.centroids.grad)


def test_half_precision_inputs_give_half_precision_outputs():
    layer = ClusteredLinear(random_matrix(16, 23, 37))
    x = torch.randn(4, 37, dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(x, layer.weight().bfloat16())
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), expected)
