"""What is written comes back: random tensors of every width, shape, granularity and dtype."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rkf
from rkf import bitpack
from rkf.format import GROUP_SIZES, index_bits, position_bytes
from rkf.matrix import Affine, ClusteredMatrix, DenseTensor, Exceptions, from_f32
from rkf.writer import Writer


def clustered(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    k: int,
    *,
    rows_per_table: int | None = None,
    affine: Affine | None = None,
    exceptions: int = 0,
    dtype: str = "bf16",
) -> ClusteredMatrix:
    """A matrix with random ranks and values, every invariant kept."""
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    rows_per_table = rows_per_table or rows
    tables = -(-rows // rows_per_table)
    indices = rng.integers(0, k, (rows, columns), dtype=np.uint8)
    counts = np.zeros((tables, k), np.uint64)
    np.add.at(counts, (np.arange(rows)[:, None] // rows_per_table, indices), 1)
    centroids = np.sort(rng.permuted(np.arange(tables * k * 2, dtype=np.float32))[: tables * k].reshape(tables, k) - k)
    overrides = None
    if exceptions:
        positions = np.sort(rng.choice(rows * columns, exceptions, replace=False))
        values = from_f32(rng.standard_normal(exceptions).astype(np.float32), dtype)
        overrides = Exceptions(positions.astype(f"<u{position_bytes(rows * columns)}"), values, dtype)
    planes = bitpack.pack(indices, index_bits(k))
    return ClusteredMatrix(shape, planes, counts, centroids, rows_per_table, "bf16", affine, overrides)


@st.composite
def matrices(draw: st.DrawFn) -> ClusteredMatrix:
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    shape = (*draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)), draw(st.integers(1, 140)))
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    granularity = draw(st.sampled_from((None, "tensor", "row", "group")))
    affine = None
    if granularity:
        group = draw(st.sampled_from(GROUP_SIZES)) if granularity == "group" else None
        size = {"tensor": (1,), "row": (rows,), "group": (rows, -(-columns // (group or 1)))}[granularity]
        which = draw(st.sampled_from(("a", "b", "ab")))
        dtypes = draw(st.tuples(*[st.sampled_from((np.float16, np.float32))] * 2))
        a = rng.uniform(0.5, 2, size).astype(dtypes[0]) if "a" in which else None
        b = rng.standard_normal(size).astype(dtypes[1]) if "b" in which else None
        affine = Affine(granularity, group, a, b)
    return clustered(
        rng,
        shape,
        draw(st.integers(2, 256)),
        rows_per_table=draw(st.integers(1, rows)),
        affine=affine,
        exceptions=draw(st.integers(0, rows * columns // 8)),
        dtype=draw(st.sampled_from(("bf16", "f16", "f32"))),
    )


def assert_equal(got: ClusteredMatrix | DenseTensor, expected: ClusteredMatrix | DenseTensor) -> None:
    np.testing.assert_array_equal(got.decode().view(np.uint32), expected.decode().view(np.uint32))
    assert type(got) is type(expected)
    assert got.shape == expected.shape
    if isinstance(got, ClusteredMatrix) and isinstance(expected, ClusteredMatrix):
        np.testing.assert_array_equal(got.counts, expected.counts)
        np.testing.assert_array_equal(got.centroids, expected.centroids)
        assert [p.tobytes() for p in got.planes] == [p.tobytes() for p in expected.planes]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=20),
        matrices(),
        min_size=1,
        max_size=4,
    )
)
def test_any_tensor_comes_back(tmp_path: Path, tensors: dict[str, ClusteredMatrix]) -> None:
    path = tmp_path / "m.rkf"
    with Writer(path, metadata={}, provenance={}, force=True) as writer:
        for name in sorted(tensors):
            writer.add(name, tensors[name], {"error": 0.5})
    with rkf.open(path) as container:
        assert list(container.tensors) == sorted(tensors)
        for name, expected in tensors.items():
            assert_equal(container.load(name), expected)
