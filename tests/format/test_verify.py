"""Semantics: faults that hashes cannot show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, models

import rkf
from rkf.cli import cli
from rkf.errors import SemanticsError, UsageError
from rkf.file import verify as verify_module
from rkf.file.archive import pack
from rkf.file.values import write_values
from rkf.file.verify import verify
from rkf.file.writer import Writer
from rkf.format.matrix import Affine, ClusteredMatrix, DenseTensor, Exceptions
from tests.format import build


def write(path: Path, tensor: ClusteredMatrix | DenseTensor) -> Path:
    with Writer(path, metadata={}, provenance={}) as writer:
        writer.add("w", tensor)
    return path


def matrix(k: int = 24, shape: tuple[int, ...] = (6, 13), **options: Any) -> ClusteredMatrix:
    return build.clustered(np.random.default_rng(0), shape, k, **options)


def test_a_whole_model_passes(tmp_path: Path) -> None:
    path, seen = build.write_model(tmp_path / "m.rkf"), []
    report = verify(path, progress=seen.append)
    with rkf.open(path) as container:
        stored = {name: entry for name, entry in container.tensors.items() if entry.kind != "alias"}
        assert report.weights == sum(entry.weights for entry in stored.values())
    assert seen == list(stored)
    assert (report.tensors, report.clustered, report.file_bytes) == (len(stored), 8, path.stat().st_size)
    pack(path, tmp_path / "p.rkf")
    assert replace(verify(tmp_path / "p.rkf"), path=path, file_bytes=report.file_bytes) == report


@pytest.mark.parametrize("block", [1, 20, 26, 40, 1000])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group 32"])
def test_blocks_of_rows_see_every_weight(monkeypatch: pytest.MonkeyPatch, block: int, granularity: str) -> None:
    monkeypatch.setattr(verify_module, "_BLOCK_WEIGHTS", block)
    rng = np.random.default_rng(1)
    for rows_per_table in (1, 2, 3, 4, 6):
        affine = build.affine(rng, 6, 13, granularity, a="f32", b="f16")
        whole = build.clustered(rng, (2, 3, 13), 5, rows_per_table=rows_per_table, affine=affine, exceptions=9)
        blocks = [part.decode() for _, part in verify_module._blocks(whole)]
        np.testing.assert_array_equal(np.concatenate(blocks).reshape(whole.shape), whole.decode())
        verify_module._check_tensor(whole, "whole")


def with_index(tensor: ClusteredMatrix, row: int, column: int, index: int) -> ClusteredMatrix:
    indices = tensor.indices()
    indices[row, column] = index
    return replace(tensor, planes=rkf.format.bitpack.pack(indices, tensor.bits))


def with_counts(tensor: ClusteredMatrix, table: int, rank: int, change: int) -> ClusteredMatrix:
    counts = tensor.counts.copy()
    counts[table, rank] += np.uint64(change)
    return replace(tensor, counts=counts)


def with_bit(tensor: ClusteredMatrix, plane: int, row: int) -> ClusteredMatrix:
    """The matrix with the last bit of a plane's row set."""
    planes = [array.copy() for array in tensor.planes]
    planes[plane][row, -1] |= 0x80
    return replace(tensor, planes=tuple(planes))


def overflowing() -> ClusteredMatrix:
    affine = Affine("row", None, np.full(6, 3e38, np.float32))
    tensor = matrix(affine=affine)
    return replace(tensor, centroids=tensor.centroids + np.float32(100))


BROKEN = {
    "indices below 24, got 24": lambda: with_index(matrix(), 5, 12, 24),
    "indices below 24, got 31": lambda: with_index(matrix(), 0, 0, 31),
    "plane 0: expected zeros in the unused bits": lambda: with_bit(matrix(), 0, 5),
    "plane 1: expected zeros in the unused bits": lambda: with_bit(matrix(), 1, 0),
    "rank 3 of table 2": lambda: with_counts(matrix(rows_per_table=2), 2, 3, 1),
    "expected finite weights, got an overflow": overflowing,
    "expected finite weights, got NaN": lambda: DenseTensor("f32", np.array([1, np.nan], "<f4")),
    "expected finite weights, got NaN or infinity": lambda: DenseTensor("bf16", np.array([0x7F80], "<u2")),
}


@pytest.mark.parametrize("what", BROKEN)
def test_meaningless_tensors_are_named(tmp_path: Path, what: str) -> None:
    path = write(tmp_path / "m.rkf", BROKEN[what]())
    rkf.open(path).close()
    with pytest.raises(SemanticsError, match=rf"m\.rkf: tensor 'w'.*{what}") as caught:
        verify(path)
    assert caught.value.exit_code == 3


def test_an_index_out_of_range_is_wrong_but_safe(tmp_path: Path) -> None:
    with rkf.open(write(tmp_path / "m.rkf", with_index(matrix(), 0, 0, 31))) as container:
        assert np.isfinite(container.decode("w")).all()


def test_exceptions_may_hide_an_overflow(tmp_path: Path) -> None:
    tensor = matrix(k=2, shape=(1, 64))
    indices = np.zeros((1, 64), np.uint8)
    indices[0, 9] = 1
    hidden = replace(
        tensor,
        planes=rkf.format.bitpack.pack(indices, 1),
        counts=np.array([[63, 1]], np.uint64),
        centroids=np.array([[0, 3e38]], np.float32),
        affine=Affine("tensor", None, np.array([2], np.float32)),
        exceptions=Exceptions(np.array([9], "<u4"), np.array([1], "<f4"), "f32"),
    )
    verify(write(tmp_path / "m.rkf", hidden))


@pytest.mark.parametrize(
    ("tokenizer", "what"),
    [
        (b"not json", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[]", "JSON"),
        (b"{}", "JSON"),
        (b'{"model": {"vocab": 3}}', "JSON"),
        (b'{"model": {"vocab": {}}, "added_tokens": [{}]}', "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"model": {"vocab": {"a": 40}}}', "from 0 to 39, got 40"),
        (b'{"model": {"vocab": {"a": -1}}}', "from 0 to 39, got -1"),
        (b'{"model": {"vocab": {"a": "1"}}}', "from 0 to 39, got '1'"),
        (b'{"model": {"vocab": {"a": true}}}', "from 0 to 39, got True"),
        (b'{"model": {"vocab": {}}, "added_tokens": [{"id": 99}]}', "from 0 to 39, got 99"),
        (b'{"model": {"vocab": [' + b'["a", 0],' * 40 + b'["b", 1]]}}', "from 0 to 39, got 40"),
    ],
)
def test_a_tokenizer_is_json_with_ids_of_the_vocabulary(tmp_path: Path, tokenizer: bytes, what: str) -> None:
    path = build.write_model(tmp_path / "m.rkf", blobs={"tokenizer.json": tokenizer})
    rkf.open(path).close()
    with pytest.raises(SemanticsError, match=rf"blob 'tokenizer.json': .*{what}"):
        verify(path)


def test_values_are_verified_with_their_model(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, "a")).to_str().encode()
    path = build.write_model(tmp_path / "m.rkf", blobs={"tokenizer.json": tokenizer})
    with rkf.open(path) as model:
        name = "model.embed_tokens.weight"
        values = model.values(name)
        huge = Affine("tensor", None, np.array([3e38], np.float32))
        far = replace(values, centroids=values.centroids + np.float32(1000), affine=huge)
        write_values(tmp_path / "fine.rkv", model, {})
        write_values(tmp_path / "huge.rkv", model, {name: far})
    verify(path, values=tmp_path / "fine.rkv")
    with pytest.raises(SemanticsError, match="overflow"):
        verify(path, values=tmp_path / "huge.rkv")
    with pytest.raises(UsageError, match="needs its model"):
        verify(tmp_path / "fine.rkv")
    for name, code in (("fine.rkv", 0), ("huge.rkv", SemanticsError.exit_code)):
        done = CliRunner().invoke(cli, ["verify", str(path), "--values", str(tmp_path / name)])
        assert done.exit_code == code, done.output


def test_the_command_loads_the_tokenizer_too(tmp_path: Path) -> None:
    path = build.write_model(tmp_path / "m.rkf", blobs={"tokenizer.json": b'{"model": {"vocab": {}}}'})
    verify(path)  # it is JSON
    done = CliRunner().invoke(cli, ["verify", str(path)])
    assert done.exit_code == SemanticsError.exit_code
    assert done.output.startswith(f"rkf: {path}: tokenizer.json: ")
