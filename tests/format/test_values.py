"""Values files: bound to their model, applied on open, free in granularity, refused for any other model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import rkf
from rkf.errors import BindingError, IntegrityError, OutputError, UsageError
from rkf.file.atomic import replacing
from rkf.file.sections import SectionWriter
from rkf.file.values import write_values
from rkf.file.writer import Writer
from rkf.format.constants import KIND_VALUES
from rkf.format.matrix import Affine, ClusteredMatrix, DenseTensor, MatrixValues
from tests.format import build
from tests.hostile import strict

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return build.write_model(tmp_path / "model.rkf")


def shifted(path: Path, **options: object) -> Path:
    """Values whose centroids of one tensor are 1 higher."""
    output = path.with_suffix(".rkv")
    with rkf.open(path) as model:
        values = model.values(NAME)
        write_values(output, model, {NAME: replace(values, centroids=values.centroids + 1)}, **options)
    return output


def test_new_values_replace_old_ones(path: Path) -> None:
    with rkf.open(path) as model, rkf.open(path, values=shifted(path, provenance={"tuned": True})) as tuned:
        for name in model.tensors:
            old, new = model.load(name), tuned.load(name)
            if name == NAME:
                assert isinstance(old, ClusteredMatrix)
                expected = replace(old, centroids=old.centroids + 1)
                np.testing.assert_array_equal(new.decode(), expected.decode())
                np.testing.assert_array_equal(tuned.values(name).centroids, expected.centroids)
            else:
                np.testing.assert_array_equal(new.decode(), old.decode())
        assert (tuned.ranks_id, tuned.dense_id, tuned.order) == (model.ranks_id, model.dense_id, "ascending")
    assert path.with_suffix(".rkv").stat().st_size < path.stat().st_size


def test_granularity_and_dtypes_are_free(path: Path) -> None:
    with rkf.open(path) as model:
        replacements = {}
        for name, entry in model.tensors.items():
            if entry.clusters is not None:
                old = model.values(name)
                rows, groups = entry.clusters.rows, -(-entry.clusters.columns // 32)
                affine = Affine("group", 32, None, np.full((rows, groups), 0.5, np.float32))
                exceptions = None if old.exceptions is None else np.ones(len(old.exceptions), np.float32)
                dtype = None if exceptions is None else "f32"
                replacements[name] = MatrixValues(old.centroids, affine, exceptions, dtype)
        write_values(path.with_suffix(".rkv"), model, replacements)
        with rkf.open(path, values=path.with_suffix(".rkv")) as other:
            for name, values in replacements.items():
                entry, matrix = other.tensors[name], other.load(name)
                assert isinstance(matrix, ClusteredMatrix)
                assert entry.values is not None
                assert (entry.values.granularity, entry.values.a, entry.values.b) == ("group", None, "f32")
                plain = replace(matrix, affine=None, exceptions=None).decode() + np.float32(0.5)
                if matrix.exceptions is not None:
                    plain.reshape(-1)[matrix.exceptions.positions] = 1
                np.testing.assert_array_equal(matrix.decode(), plain)
                np.testing.assert_array_equal(matrix.centroids, values.centroids)


def test_unordered_values_say_so(path: Path) -> None:
    output = path.with_suffix(".rkv")
    with rkf.open(path) as model:
        values = model.values(NAME)
        scrambled = replace(values, centroids=values.centroids[:, ::-1].copy())
        with pytest.raises(UsageError, match="strictly ascending"):
            write_values(output, model, {NAME: scrambled})
        assert not output.exists()
        write_values(output, model, {NAME: scrambled}, ordered=False)
    with rkf.open(path, values=output) as container:
        assert container.order == "none"
        np.testing.assert_array_equal(container.values(NAME).centroids, scrambled.centroids)


def test_a_values_file_is_inspected_but_not_loaded(path: Path) -> None:
    output = shifted(path, metadata={"note": "tuned"}, provenance={"steps": 3})
    with rkf.open(output) as values, rkf.open(path) as model:
        assert (values.kind, values.metadata, values.provenance) == (KIND_VALUES, {"note": "tuned"}, {"steps": 3})
        assert {entry.kind for entry in values.tensors.values()} == {"values"}
        np.testing.assert_array_equal(values.values(NAME).centroids, model.values(NAME).centroids + 1)
        with pytest.raises(UsageError, match=r"model\.rkv: a values file has no ranks"):
            values.load(NAME)
        with pytest.raises(UsageError, match="expected a clustered tensor"):
            values.counts(NAME)


def test_values_of_another_model_are_refused(path: Path, tmp_path: Path) -> None:
    other = build.write_model(tmp_path / "other.rkf", seed=1)
    with pytest.raises(BindingError, match=r"model\.rkv: made for ranks .*other\.rkf"):
        rkf.open(other, values=shifted(path))


def one(path: Path, dense: float = 1, **options: object) -> Path:
    """One matrix and one dense tensor; the matrix is the same in all."""
    rng = np.random.default_rng(0)
    with Writer(path, metadata={}, provenance={}) as writer:
        writer.add("d", DenseTensor("f32", np.full(3, dense, "<f4")))
        writer.add("w", build.clustered(rng, (4, 8), 4))
    return path


def test_values_for_other_dense_tensors_are_refused(tmp_path: Path) -> None:
    with rkf.open(one(tmp_path / "a.rkf")) as model:
        write_values(tmp_path / "a.rkv", model, {})
    one(tmp_path / "b.rkf", dense=2)
    rkf.open(tmp_path / "a.rkf", values=tmp_path / "a.rkv").close()
    with pytest.raises(BindingError, match="made for dense tensors"):
        rkf.open(tmp_path / "b.rkf", values=tmp_path / "a.rkv")


def test_another_set_of_tensors_is_refused(tmp_path: Path) -> None:
    with rkf.open(one(tmp_path / "a.rkf")) as model:
        write_values(tmp_path / "a.rkv", model, {})
    data = (tmp_path / "a.rkv").read_bytes()
    for key, value in (("name", "v"), ("shape", [2, 2, 8]), ("rows_per_table", 5)):
        if key == "rows_per_table":
            value = 3  # two tables: the section must have room for both
        broken = build.resealed(data, lambda d, k=key, v=value: d["tensors"][0].update({k: v}))
        (tmp_path / "b.rkv").write_bytes(broken)
        with pytest.raises((BindingError, rkf.errors.StructureError), match=r"b\.rkv: "):
            rkf.open(tmp_path / "a.rkf", values=tmp_path / "b.rkv")


def test_only_values_files_are_values(path: Path) -> None:
    values = shifted(path)
    for model, used in ((path, path), (values, values)):
        with pytest.raises(UsageError, match="expected a values file"):
            rkf.open(model, values=used)


def test_damaged_values_are_refused(path: Path) -> None:
    values = shifted(path)
    data = bytearray(values.read_bytes())
    data[130] ^= 1
    values.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.rkv: section 0 \(values\)"):
        rkf.open(path, values=values)


def test_wrong_replacements_are_refused(path: Path) -> None:
    output = path.with_suffix(".rkv")
    with rkf.open(path) as model:
        values = model.values(NAME)
        wrong = [
            ({"w": values}, "'w': expected a clustered tensor"),
            ({"model.norm.weight": values}, "'model.norm.weight': expected a clustered tensor"),
            ({"lm_head.weight": values}, "'lm_head.weight': expected a clustered tensor"),
            ({NAME: replace(values, centroids=values.centroids[:, 1:])}, "centroids: expected"),
            ({NAME: replace(values, centroids=values.centroids.astype(np.float64))}, "centroids: expected"),
            ({NAME: replace(values, affine=Affine("row", None, np.ones(24)))}, "affine: expected"),
            ({NAME: replace(values, affine=Affine("row", None, np.ones(23, "<f4")))}, "a: expected"),
            ({NAME: replace(values, affine=Affine("tensor", None, np.zeros(1, "<f4")))}, "above 0"),
        ]
        for replacements, what in wrong:
            with pytest.raises(UsageError, match=what):
                write_values(output, model, replacements)
        exceptional = next(n for n, e in model.tensors.items() if e.clusters is not None and e.clusters.exceptions)
        without = replace(model.values(exceptional), exceptions=None, exceptions_dtype=None)
        with pytest.raises(UsageError, match="expected 3 exception values"):
            write_values(output, model, {exceptional: without})
        with pytest.raises(OutputError, match="the output is the input"):
            write_values(path, model, {}, force=True)
    assert not output.exists()


def test_a_dense_model_has_no_values(tmp_path: Path) -> None:
    with Writer(tmp_path / "m.rkf", metadata={}, provenance={}) as writer:
        writer.add("d", DenseTensor("f32", np.ones(3, "<f4")))
    with rkf.open(tmp_path / "m.rkf") as model, pytest.raises(UsageError, match="no clustered tensor"):
        write_values(tmp_path / "m.rkv", model, {})


def test_a_values_file_may_be_empty(tmp_path: Path) -> None:
    """For a model without clustered tensors; rkf writes none, and reads it."""
    with Writer(tmp_path / "m.rkf", metadata={}, provenance={}) as writer:
        writer.add("d", DenseTensor("f32", np.ones(3, "<f4")))
    with rkf.open(tmp_path / "m.rkf") as model, replacing(tmp_path / "m.rkv") as out:
        ids = {"ranks_id": model.ranks_id, "dense_id": model.dense_id}
        empty = {"metadata": {}, "order": "ascending", "provenance": {}, "tensors": []}
        SectionWriter(out).finish({**ids, **empty}, KIND_VALUES)
    with rkf.open(tmp_path / "m.rkf", values=tmp_path / "m.rkv") as model:
        np.testing.assert_array_equal(model.decode("d"), np.ones(3))
    assert strict.read(tmp_path / "m.rkf", tmp_path / "m.rkv").keys() == {"d"}


def test_closing_the_model_closes_its_values(path: Path) -> None:
    container = rkf.open(path, values=shifted(path))
    container.close()
    with pytest.raises(UsageError, match="closed"):
        container.values(NAME)
