"""The writer's refusals before anything is committed."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rkf
from rkf.errors import StructureError, UsageError
from rkf.file.writer import Writer
from rkf.format.matrix import Affine, Alias, DenseTensor, Exceptions
from tests.format import build

MATRIX = build.clustered(np.random.default_rng(0), (6, 40), 16, rows_per_table=3, exceptions=4, dtype="f32")
DENSE = DenseTensor("f32", np.ones(5, "<f4"))
AFFINE = Affine("row", None, np.ones(6, "<f4"))


def exceptions(positions: Any, values: Any = (1, 2), dtype: str = "f32") -> Exceptions:
    return Exceptions(np.array(positions, "<u4"), np.array(values, "<f4"), dtype)


WRONG: dict[str, tuple[Any, str]] = {
    "dtype": (DenseTensor("f64", np.ones(3)), "expected a dtype of bf16, f16, f32"),
    "dense array": (DenseTensor("f16", np.ones(3)), "expected float16"),
    "k": (replace(MATRIX, centroids=MATRIX.centroids[:, :1]), "k from 2 to 256"),
    "rows per table": (replace(MATRIX, rows_per_table=7), "rows_per_table from 1 to 6"),
    "planes": (replace(MATRIX, planes=()), "expected 1 planes for k = 16, got 0"),
    "plane": (replace(MATRIX, planes=(MATRIX.planes[0][:, 1:],)), r"plane 0: expected uint8 \[6, 20\]"),
    "plane dtype": (replace(MATRIX, planes=(MATRIX.planes[0].astype(int),)), "plane 0: expected uint8"),
    "counts": (replace(MATRIX, counts=MATRIX.counts[:1]), r"counts: expected uint64 \[2, 16\]"),
    "centroids": (replace(MATRIX, centroids=MATRIX.centroids[:1]), r"centroids: expected float32 \[2, 16\]"),
    "centroids dtype": (replace(MATRIX, centroids=MATRIX.centroids.astype("<f8")), "centroids: expected float32"),
    "order": (replace(MATRIX, centroids=MATRIX.centroids[:, ::-1]), "strictly ascending"),
    "affine": (replace(MATRIX, affine=Affine("row", None, np.ones(6))), "affine: expected float16 or float32"),
    "affine shape": (replace(MATRIX, affine=Affine("tensor", None, np.ones(6, "<f4"))), r"a: expected float32 \[1\]"),
    "a of 0": (replace(MATRIX, affine=Affine("row", None, np.zeros(6, "<f4"))), "above 0"),
    "b of NaN": (replace(MATRIX, affine=Affine("row", None, None, np.full(6, np.nan, "<f4"))), "affine b"),
    "positions": (replace(MATRIX, exceptions=exceptions([2, 1])), "ascending"),
    "position": (replace(MATRIX, exceptions=exceptions([1, 240])), "below 240"),
    "exceptions": (replace(MATRIX, exceptions=exceptions([1, 2], [1])), r"exceptions: expected float32 \[2\]"),
    "exception of NaN": (replace(MATRIX, exceptions=exceptions([1, 2], [1, np.nan])), "exception values"),
    "positions of 64 bits": (
        replace(MATRIX, exceptions=Exceptions(np.array([1]), np.ones(1, "<f4"), "f32")),
        "exception positions: expected uint32",
    ),
}


@pytest.mark.parametrize(("tensor", "what"), WRONG.values(), ids=WRONG)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, tensor: Any, what: str) -> None:
    with (
        pytest.raises(UsageError, match=rf"m\.rkf: tensor 'w'.*{what}"),
        Writer(tmp_path / "m.rkf", metadata={}, provenance={}) as writer,
    ):
        writer.add("w", tensor)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tensor",
    [
        DenseTensor("f32", np.ones((1, 1, 1, 1, 1), "<f4")),
        replace(MATRIX, source_dtype="q4_1"),
        replace(MATRIX, affine=Affine("row")),
        replace(MATRIX, affine=Affine("group", 48, np.ones((6, 1), "<f4"))),
        replace(MATRIX, exceptions=exceptions(range(31), range(31))),
        Alias("nothing"),
    ],
)
def test_what_readers_refuse_is_refused_at_the_end(tmp_path: Path, tensor: Any) -> None:
    with (
        pytest.raises(StructureError, match=r"m\.rkf: tensor 'w'"),
        Writer(tmp_path / "m.rkf", metadata={}, provenance={}) as writer,
    ):
        writer.add("w", tensor)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [("b", "a"), ("a", "a"), ("b", "B"), ("é", "z")])
def test_names_come_in_order(tmp_path: Path, names: tuple[str, str]) -> None:
    with (
        pytest.raises(UsageError, match="expected names in order"),
        Writer(tmp_path / "m.rkf", metadata={}, provenance={}) as writer,
    ):
        for name in names:
            writer.add(name, DENSE)
    assert list(tmp_path.iterdir()) == []


def test_blobs_come_last_and_are_not_empty(tmp_path: Path) -> None:
    with Writer(tmp_path / "m.rkf", metadata={}, provenance={}) as writer:
        writer.add("a", DENSE)
        with pytest.raises(UsageError, match="at least one byte"):
            writer.blob("tokenizer.json", b"")
        writer.blob("tokenizer.json", b"{}")
        with pytest.raises(UsageError, match="expected tensors before blobs"):
            writer.add("b", DENSE)
    with rkf.open(tmp_path / "m.rkf") as container:
        assert list(container.tensors) == ["a"]


def test_blobs_come_in_order(tmp_path: Path) -> None:
    with (
        pytest.raises(StructureError, match="in name order"),
        Writer(tmp_path / "m.rkf", metadata={}, provenance={}) as writer,
    ):
        writer.blob("x-a", b"1")
        writer.blob("tokenizer.json", b"{}")
    assert list(tmp_path.iterdir()) == []


def test_metadata_without_a_canonical_form_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"m\.rkf: provenance\.when: .* got a NoneType"),
        Writer(tmp_path / "m.rkf", metadata={}, provenance={"when": None}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_arrays_may_lie_in_any_order_in_memory(tmp_path: Path) -> None:
    data = np.arange(12, dtype="<f4").reshape(3, 4)
    with Writer(tmp_path / "m.rkf", metadata={}, provenance={}) as writer:
        writer.add("a", DenseTensor("f32", data.T))
    with rkf.open(tmp_path / "m.rkf") as container:
        np.testing.assert_array_equal(container.decode("a"), data.T)


def test_matrices_are_not_kept_in_memory(tmp_path: Path) -> None:
    """A matrix may be freed as soon as it is written: its ranks are on disk, its values in the spool."""
    affine = Affine("group", 32, np.ones((512, 16), "<f4"))
    tensor = build.clustered(np.random.default_rng(0), (512, 512), 16, affine=affine)
    with Writer(tmp_path / "m.rkf", metadata={}, provenance={}) as writer:
        writer.add("w000", tensor)
        tracemalloc.start()
        for number in range(1, 200):
            writer.add(f"w{number:03}", tensor)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 << 20
    assert (tmp_path / "m.rkf").stat().st_size > 30 << 20
