"""Products in eight bits against f32."""

import numpy as np
import pytest
from numba import njit

from rkf.calibrate import passes
from rkf.errors import OutputError
from rkf.numbers import eight_bit_kernel, eight_bits
from rkf.numbers.eight_bit_kernel import AVX2, VNNI
from rkf.numbers.eight_bits import Near, Panels, Rounded
from tests.calibrate.test_calibration import PROGRAM, READER

RANDOM = np.random.Generator(np.random.Philox(4))


@pytest.fixture(params=["vnni", "avx2", "f32"])
def way(request, monkeypatch):
    """The forms of the kernel where the CPU has them, and the products of all other CPUs."""
    form = {"vnni": VNNI, "avx2": AVX2}.get(request.param)
    if form is not None and eight_bit_kernel.form() not in (form, VNNI):
        pytest.skip(f"this CPU has no {request.param}")
    use(form, monkeypatch)


def use(form, monkeypatch):
    monkeypatch.setattr(eight_bit_kernel, "form", lambda: form)
    monkeypatch.setattr(eight_bit_kernel, "multiply", njit(nogil=True)(eight_bit_kernel.multiply.py_func))


@pytest.mark.parametrize(("tokens", "rows", "cols"), [(1, 1, 1), (7, 65, 130), (64, 192, 576), (5, 63, 127)])
def test_products_are_those_of_the_rounded_numbers(way, tokens, rows, cols):
    x, weights = RANDOM.standard_normal((tokens, cols), np.float32), RANDOM.standard_normal((rows, cols), np.float32)
    x[0] *= 1000
    left, right = Rounded.of(x), Panels.of(weights)
    near, wide = left.decoded(), right[np.arange(rows)]
    blocks = [np.abs(each).max() for each in np.split(weights[0], range(128, cols, 128))]
    np.testing.assert_allclose(wide[0], weights[0], atol=max(blocks) / 253)
    expected = near.astype(np.float64) @ wide.T.astype(np.float64)
    np.testing.assert_allclose(right.product(x), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.linalg.norm(expected - x @ weights.T) < 0.02 * np.linalg.norm(x @ weights.T)


@pytest.mark.skipif(eight_bit_kernel.form() != VNNI, reason="this CPU has no vpdpbusd")
def test_the_forms_have_the_same_bits(monkeypatch):
    x, weights = (
        Rounded.of(RANDOM.standard_normal((20, 300), np.float32)),
        RANDOM.standard_normal((70, 300), np.float32),
    )
    found = []
    for form in (VNNI, AVX2):
        use(form, monkeypatch)
        found.append(eight_bits.rounded_product(x, Panels.of(weights)))
    np.testing.assert_array_equal(*found)


def test_sums_of_the_largest_numbers_are_exact(way):
    x = np.where(RANDOM.random((7, 256)) < 0.5, 127, -127).astype(np.float32)
    x[0], x[1] = 127, -127
    np.testing.assert_array_equal(Panels.of(x).product(x), x @ x.T)


def test_zeros_and_numbers_of_any_size(way):
    x = np.array([[0, 0], [127, -127], [1e18, 0], [1e-40, 0]], np.float32)
    np.testing.assert_allclose(Panels.of(x).product(x), x @ x.T, rtol=1e-6, atol=1e-20)


def test_only_a_difference_is_rounded(way):
    x, weights = RANDOM.standard_normal((9, 200), np.float32), RANDOM.standard_normal((70, 200), np.float32)
    near = Near(Panels.of(weights), x, x @ weights.T)
    np.testing.assert_array_equal(near.product(x), x @ weights.T)
    change = 1e-4 * RANDOM.standard_normal((9, 200), np.float32)
    error = near.product(x + change) - (x + change).astype(np.float64) @ weights.T.astype(np.float64)
    assert np.linalg.norm(error) < 0.03 * np.linalg.norm(change @ weights.T)


def test_rows_of_a_table_and_mapped_files(tmp_path):
    weights = RANDOM.standard_normal((70, 140), np.float32)
    with eight_bits.mapped(tmp_path) as keep:
        for kept in (Panels.of(weights), *(keep(Panels.of(each)) for each in (weights, weights))):
            found = kept[np.array([[3], [69]])]
            assert found.shape == (2, 1, 140)
            np.testing.assert_allclose(found, weights[[[3], [69]]], atol=np.abs(weights).max() / 253)
        assert not list(tmp_path.iterdir())
        text = passes.write_text(PROGRAM, READER, [[1], [2]], ctx=9, keep=keep)
    np.testing.assert_array_equal(text, passes.write_text(PROGRAM, READER, [[1], [2]], ctx=9))
    with pytest.raises(OutputError, match="missing"), eight_bits.mapped(tmp_path / "missing"):
        pass
