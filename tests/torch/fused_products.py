"""Triton kernels against the reference decode. Run by test_fused.py, under the interpreter where there is no GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rkf.torch import ClusteredLinear, ClusteredStack
from rkf.torch.fused import FusedLinear, FusedStack, fuse
from tests.runtime.matrices import random_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = [
    {"affine": "none"},
    {"affine": "tensor", "exceptions": 3},
    {"affine": "both", "exceptions": 40},
    {"affine": 32, "exceptions": 9},
    {"affine": "row", "tables": 3, "exceptions": 9},
]


def products(matrix, tokens, bias=None, dtype=torch.float32):
    """The kernels' products, and the product with the decoded matrix in f64."""
    torch.manual_seed(tokens)
    layer = ClusteredLinear(matrix, bias).to(DEVICE)
    x = torch.randn(tokens, matrix.columns, device=DEVICE).to(dtype)
    with torch.no_grad():
        found = FusedLinear(layer)(x)
    expected = x.double().cpu() @ torch.from_numpy(matrix.decode()).double().T
    return found.cpu(), expected if bias is None else expected + bias


@pytest.mark.parametrize("k", [2, 4, 8, 16, 24, 64, 100, 256])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_products_equal_the_reference_decode(k, form, tokens):
    found, expected = products(random_matrix(k, 9, 75, grid=False, **form), tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows,columns,tokens", [(1, 1, 1), (1, 8, 2), (70, 264, 17), (130, 1100, 1), (65, 40, 70)])
def test_shapes_past_every_block(rows, columns, tokens):
    matrix = random_matrix(16, rows, columns, grid=False, exceptions=rows * columns // 20)
    found, expected = products(matrix, tokens, torch.randn(rows))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_half_precision(tokens, dtype):
    if DEVICE == "cpu" and dtype is torch.bfloat16 and tokens > 1:
        pytest.skip("Triton's interpreter takes the bits of bf16 for integers in products of tiles")
    matrix = random_matrix(32, 20, 96, affine="both", exceptions=5)
    found, expected = products(matrix, tokens, dtype=dtype)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max())


@pytest.mark.parametrize("form", [*FORMS[:-1], {"affine": "row", "tables": 6, "exceptions": 30}], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_products_of_one_of_a_stack(form, tokens):
    torch.manual_seed(0)
    matrix = replace(random_matrix(16, 24, 75, grid=False, **form), shape=(3, 8, 75))
    stack, x = ClusteredStack(matrix).to(DEVICE), torch.randn(tokens, 75, device=DEVICE)
    fused = fuse(torch.nn.ModuleList([stack]))[0]
    assert isinstance(fused, FusedStack)
    for number in range(3):
        expected = x.double().cpu() @ torch.from_numpy(matrix.decode()[number]).double().T
        np.testing.assert_allclose(fused(x, number).cpu(), expected, rtol=1e-5, atol=1e-5)


def test_a_stack_whose_tables_cross_its_matrices_stays():
    matrix = replace(random_matrix(16, 24, 16, tables=2), shape=(3, 8, 16))
    assert isinstance(fuse(torch.nn.ModuleList([ClusteredStack(matrix)]))[0], ClusteredStack)


def test_an_index_past_k_reads_padding():
    matrix = random_matrix(3, 4, 16, affine="none")
    for plane in matrix.planes:
        plane[...] = 0xFF
    layer = FusedLinear(ClusteredLinear(matrix).to(DEVICE))
    assert torch.equal(layer(torch.ones(1, 16, device=DEVICE)).cpu(), torch.zeros(1, 4))


def test_fuse_reaches_every_layer():
    torch.manual_seed(0)
    inner = torch.nn.Sequential(ClusteredLinear(random_matrix(16, 12, 16)), torch.nn.ReLU())
    module = torch.nn.Sequential(inner, ClusteredLinear(random_matrix(16, 5, 12), torch.randn(5))).to(DEVICE)
    x = torch.randn(2, 3, 16, device=DEVICE)
    with torch.no_grad():
        expected = module(x)
        assert fuse(module) is module
        assert isinstance(module[0][0], FusedLinear) and isinstance(module[1], FusedLinear)
        # Sums in another order: of numbers near 1000 that cancel, a few units of the last place of the largest.
        torch.testing.assert_close(module(x), expected, rtol=1.3e-6, atol=3e-7 * float(expected.abs().max()))
