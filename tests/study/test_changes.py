"""Changes of one list of centroids in studies: permutations, ordered draws, moments."""

import numpy as np
import pytest

from rkf.format.matrix import ascending
from rkf.study.changes import compared, matched, moments
from rkf.study.interpolate import path
from rkf.study.preserve import DRAWS, MAPS
from rkf.study.scramble import PARTIAL, blocks, permuting, reverse, swap, whole, within
from rkf.study.subject import generator

SIZES = (2, 3, 4, 5, 16, 31, 256)


def matrix(k, seed=0):
    """Ascending centroids and counts, as clustering produces them."""
    random = np.random.Generator(np.random.Philox(key=seed))
    return np.sort(random.standard_normal(k)), random.integers(1, 1000, k).astype(np.uint64)


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("permutation", [whole, *PARTIAL.values()], ids=["whole", *PARTIAL])
def test_a_permutation_has_every_rank_once(permutation, k):
    assert sorted(permutation(k, generator(0, "a"))) == list(range(k))


def test_partial_permutations_are_what_they_say():
    random = generator(0, "a")
    assert swap(1, 5, random).tolist() == [1, 0, 3, 2, 4]
    assert swap(2, 8, random).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]
    assert swap(4, 7, random).tolist() == [4, 5, 6, 3, 0, 1, 2]
    assert reverse(4, random).tolist() == [3, 2, 1, 0]
    inside = within(4, 10, random)
    assert [sorted(inside[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert inside.tolist() != list(range(10))
    moved = blocks(4, 16, random)
    assert all((np.diff(moved[i : i + 4]) == 1).all() for i in range(0, 16, 4))
    assert moved.tolist() != list(range(16))


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("change", (DRAWS | MAPS).values(), ids=DRAWS | MAPS)
def test_what_preserves_order_ascends(change, k):
    centroids, counts = matrix(k)
    values = change(centroids, counts, generator(0, "a"))
    assert values.shape == (k,)
    assert (np.diff(values) >= 0).all()
    assert (np.diff(ascending(values)) > 0).all()


def test_draws_lie_where_they_should():
    centroids, counts = matrix(256)
    mean, variance = moments(centroids, counts)
    random = generator(0, "a")
    even = DRAWS["uniform"](centroids, counts, random)
    assert even[0] >= centroids[0] and even[-1] <= centroids[-1]
    for name in ("gaussian", "laplace"):
        drawn = DRAWS[name](centroids, counts, random)
        assert abs(drawn.mean() - mean) < 0.2 and 0.7 < drawn.var() / variance < 1.4
    tails = DRAWS["log-uniform"](centroids, counts, random)
    assert (tails < 0).sum() == (centroids < 0).sum()
    assert np.abs(tails).max() <= np.abs(centroids).max()
    np.testing.assert_allclose(np.diff(MAPS["ranks"](centroids, counts, random), 2), 0, atol=1e-12)


@pytest.mark.parametrize("change", [permuting(whole), *DRAWS.values(), *MAPS.values()])
def test_matching_restores_mean_and_variance_and_nothing_else(change):
    centroids, counts = matrix(31)
    values = change(centroids, counts, generator(3, "a"))
    restored = matched(values, centroids, counts)
    np.testing.assert_allclose(moments(restored, counts), moments(centroids, counts), atol=1e-12)
    slope, shift = np.polyfit(values, restored, 1)
    assert slope > 0
    np.testing.assert_allclose(slope * values + shift, restored, atol=1e-10)


def test_figures_of_two_lists_are_those_of_the_weights():
    centroids, counts = matrix(16)
    values = permuting(whole)(centroids, counts, generator(0, "a"))
    old, new = np.repeat(centroids, counts.astype(int)), np.repeat(values, counts.astype(int))
    np.testing.assert_allclose(moments(centroids, counts), (old.mean(), old.var()))
    np.testing.assert_allclose(
        compared(values, centroids, counts), (((new - old) ** 2).mean() / old.var(), np.corrcoef(new, old)[0, 1])
    )


def test_a_matrix_of_one_value_stays_as_it_is():
    centroids, counts = np.array([0.5, 0.6]), np.array([9, 0], np.uint64)
    np.testing.assert_allclose(matched(np.array([0.7, 0.1]), centroids, counts)[0], 0.5)
    assert compared(centroids[::-1].copy(), centroids, counts) == (0.0, 1.0)


def test_the_straight_path_has_its_ends():
    centroids, counts = matrix(16)
    for change in (permuting(whole), DRAWS["gaussian"]):
        np.testing.assert_allclose(path(change, 0)(centroids, counts, generator(0, "a")), centroids)
        end = matched(change(centroids, counts, generator(0, "a")), centroids, counts)
        np.testing.assert_allclose(path(change, 1)(centroids, counts, generator(0, "a")), end)


def test_values_that_meet_in_f32_still_ascend():
    assert (np.diff(ascending(np.array([-1, 0, 0, 1e-60, 1, 1 + 1e-12, 2]))) > 0).all()
