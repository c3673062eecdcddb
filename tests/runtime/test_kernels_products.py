"""Every kernel against decode() and numpy, over widths, odd shapes, affine granularities, tables and exceptions."""

import itertools

import numpy as np
import pytest

from rkf.runtime import cpu_features
from tests.runtime.matrices import product, random_matrix, whole_activations

LEVEL = cpu_features.level()
COLUMNS = [1, 7, 63, 64, 65, 127, 128, 129, 576, 1000]


def expected(matrix, whole, scale):
    return (whole * scale[:, None].astype(np.float64)) @ matrix.decode().astype(np.float64).T


def close(found, wanted, whole, scale, matrix):
    """Whether values agree within f32 rounding of sums whose terms have a known size."""
    size = np.abs(whole * scale[:, None]) @ np.abs(matrix.decode()).T
    assert np.all(np.abs(found - wanted) <= 4e-6 * size + 1e-30)


@pytest.mark.parametrize("k", [2, 3, 7, 8, 16, 24, 32, 64, 100, 128, 200, 255])
def test_fast_grid_products_equal_the_decode(k):
    for tokens, columns in itertools.product((1, 2, 5, 40), COLUMNS):
        matrix = random_matrix(k, 37, columns, seed=columns)
        whole, scale = whole_activations(tokens, columns)
        close(product(matrix, whole, scale, LEVEL), expected(matrix, whole, scale), whole, scale, matrix)


@pytest.mark.parametrize("tables", [1, 3])
def test_products_of_values_in_groups_equal_the_decode(tables):
    for tokens, columns in itertools.product((1, 2, 40), (63, 128, 1000)):
        matrix = random_matrix(64, 37, columns, grouped=True, tables=tables, seed=columns)
        whole, scale = whole_activations(tokens, columns)
        close(product(matrix, whole, scale, LEVEL), expected(matrix, whole, scale), whole, scale, matrix)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("tables", [1, 3])
def test_rows_that_fill_no_panel(rows, tables):
    for k, tokens in itertools.product((16, 100), (3, 60)):
        matrix = random_matrix(k, rows, 200, tables=min(tables, rows))
        whole, scale = whole_activations(tokens, 200)
        wanted = expected(matrix, whole, scale)
        close(product(matrix, whole, scale, LEVEL), wanted, whole, scale, matrix)
        low, high = rows // 3, rows - rows // 4
        some = product(matrix, whole, scale, LEVEL, span=(low, high))
        assert np.isnan(some[:, :low]).all()
        assert np.isnan(some[:, high:]).all()
        assert np.array_equal(some[:, low:high], product(matrix, whole, scale, LEVEL)[:, low:high])
