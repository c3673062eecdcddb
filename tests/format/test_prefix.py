"""Coarser matrices from a prefix of the planes: the specification's formula, implemented again."""

import math

import numpy as np
import pytest

from rkf.file.prefix import coarser, within
from rkf.format import bitpack
from rkf.format.constants import index_bits, plane_bits
from rkf.format.matrix import Affine, ClusteredMatrix, Exceptions


def matrix(k, tables=2):
    random = np.random.Generator(np.random.Philox(key=k))
    rows, columns = 6, 37
    indices = random.integers(0, max(k - k // 4, 2), (rows, columns), np.uint8)  # the last quarter of the ranks is rare
    indices[0, 0] = k - 1
    counts = np.stack([np.bincount(part.ravel(), minlength=k) for part in np.split(indices, tables)])
    return ClusteredMatrix(
        shape=(rows, columns),
        planes=bitpack.pack(indices, index_bits(k)),
        counts=counts.astype(np.uint64),
        centroids=np.sort(random.standard_normal((tables, k)), axis=1).astype(np.float32),
        rows_per_table=rows // tables,
        source_dtype="f32",
        affine=Affine("row", a=random.uniform(0.5, 2, rows).astype(np.float16)),
        exceptions=Exceptions(np.array([3, 50], np.uint32), np.array([9, -9], np.float32), "f32"),
    )


def merged(counts, centroids):
    """One merged centroid, term by term in f64."""
    total = weighted = plain = 0.0
    for count, centroid in zip(counts, centroids, strict=True):
        total += float(count)
        weighted += float(count) * float(centroid)
        plain += float(centroid)
    return np.float32(weighted / total if total else plain / len(centroids))


@pytest.mark.parametrize("k", [3, 8, 24, 64, 100, 200, 256])
def test_merged_centroids_follow_the_formula(k):
    full = matrix(k)
    for planes in range(1, len(full.planes) + 1):
        shift = sum(plane_bits(full.bits)[planes:])
        found = coarser(full, planes)
        assert found.k == math.ceil(k / 2**shift)
        for table, row in enumerate(found.centroids):
            for j, centroid in enumerate(row):
                members = [i for i in range(k) if i >> shift == j]
                assert centroid == merged(full.counts[table, members], full.centroids[table, members])
        assert np.array_equal(found.indices(), full.indices() >> shift)
        assert found.counts.sum() == full.counts.sum()
        wanted = found.centroids[np.arange(6)[:, None] // 3, full.indices() >> shift] * full.affine.spread(
            full.affine.a, 37
        )
        wanted.ravel()[[3, 50]] = 9, -9
        assert np.array_equal(found.decode(), wanted)


@pytest.mark.parametrize(
    ("k", "bits", "kept"),
    [(64, 4, 4), (64, 5, 4), (64, 6, 6), (64, 1, 4), (128, 6, 6), (8, 4, 3), (8, 2, 2), (256, 7, 4), (16, 4, 4)],
)
def test_as_many_planes_as_fit(k, bits, kept):
    full = matrix(k)
    found = within(full, bits)
    assert sum(plane_bits(found.bits)) == found.bits == kept
    assert (found is full) == (kept == full.bits)
