"""The kernels for ARM: they compile to the intended instructions and give the same bits as this CPU's own."""

import numpy as np
import pytest

from rkf.runtime import cpu_features
from tests.runtime.arm import Processor, Sections, compiled
from tests.runtime.matrices import product, random_matrix, whole_activations

SDOT, TBL = (0xFFE0FC00, 0x4E809400), (0xFFE09C00, 0x4E000000)  # mask and value of an instruction, 16 lanes


def count(code, instruction):
    mask, value = instruction
    return sum(word & mask == value for word in Sections(code).text())


def test_a_whole_pass_compiles():
    code = compiled("step")
    assert len(Sections(code).text()) > 100


# With 255 values on the grid, each rank is its value, so there is no table.
@pytest.mark.parametrize(("k", "grid", "tables"), [(16, True, 1), (24, False, 1), (100, True, 2), (255, True, 0)])
def test_products_have_this_cpus_bits(k, grid, tables):
    codes = {}

    def run(name, *arguments):
        codes[name] = compiled(name)
        Processor(codes[name])(*arguments)

    for tokens, columns in ((1, 200), (3, 129)):
        matrix = random_matrix(k, 13, columns, grid=grid, affine="row" if k == 255 else "both", seed=k)
        activations = whole_activations(tokens, columns)
        found = product(matrix, *activations, "neon", run=run)
        assert np.array_equal(found, product(matrix, *activations, cpu_features.level()))
    assert len(codes) == 2
    for code in codes.values():
        assert count(code, SDOT) >= 8 * 16  # eight rows of a block
        assert count(code, TBL) >= 8 * tables
