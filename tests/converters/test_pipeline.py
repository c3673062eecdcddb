"""Conversion end to end: the stored tensors, deterministic bytes, the ledger, and what each kind of end leaves."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rkf import __version__
from rkf.cluster.clustering import cluster
from rkf.cluster.recipe import Recipe
from rkf.converters.pipeline import convert
from rkf.converters.progress import Step
from rkf.converters.source import open_source, stored_head
from rkf.converters.work import WorkFolder
from rkf.errors import ChangedError, OutputError, RkfError, SourceError, UnsupportedError, UsageError
from rkf.file.atomic import replacing
from rkf.file.container import open_file
from rkf.format.matrix import ClusteredMatrix

ROOT = Path(__file__).resolve().parents[2]
DOWN = "model.layers.0.mlp.down_proj.weight"


def test_dense_recipe_stores_everything_as_it_came(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    kinds = {DOWN: gguf.GGMLQuantizationType.Q4_1, "model.embed_tokens.weight": gguf.GGMLQuantizationType.BF16}
    path = gguf_file("llama", kinds=kinds)
    convert(path, tmp_path / "out.rkf", recipe="dense")
    source = open_source(path)
    with open_file(tmp_path / "out.rkf") as file:
        assert set(file.tensors) == set(source.tensors)
        for name in source.tensors:
            stored, original = file.load(name), source.read(name)
            assert stored.dtype == original.dtype  # type: ignore[union-attr]
            np.testing.assert_array_equal(stored.data, original.data)  # type: ignore[union-attr]
        assert file.blob("tokenizer.json") == source.tokenizer_json
        assert file.blob("chat_template.jinja") == b"{{ messages }}"
        assert file.model == source.model


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_clustered_file(hf_folder: Callable[..., Path], tmp_path: Path, family: str) -> None:
    folder = hf_folder(family)
    ledger = convert(folder, tmp_path / "out.rkf", k=8)
    source = open_source(folder)
    recipe = Recipe.load("default", source.model.program, 8, stored_head(source))
    with open_file(tmp_path / "out.rkf") as file:
        assert [row.name for row in ledger.rows] == list(file.tensors)
        for name in source.tensors:
            expected, stats = cluster(source.read(name), recipe.rule(name, source.tensors[name].shape), name)
            np.testing.assert_array_equal(file.decode(name), expected.decode())
            assert file.tensors[name].stats == stats
            assert file.tensors[name].source_dtype == "bf16"
        tied = family == "qwen2"
        assert (file.tensors["lm_head.weight"].kind == "alias") == tied
        assert file.tensors["model.embed_tokens.weight"].k == (32 if tied else 8)  # the head is more sensitive
        assert file.provenance["source"] == {"files": source.files, "label": folder.name}
        assert file.provenance["recipe"] == {"name": "default", "text": recipe.text, "k": 8}
        assert file.provenance["rkf"] == __version__
    assert list(tmp_path.glob("out.*")) == [tmp_path / "out.rkf"]


def test_same_bytes_over_runs_and_workers(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    path = gguf_file("qwen3", kinds={DOWN: gguf.GGMLQuantizationType.Q8_0})
    files = []
    for number, workers in enumerate((1, 2, 2, 5)):
        convert(path, tmp_path / f"{number}.rkf", workers=workers)
        files.append((tmp_path / f"{number}.rkf").read_bytes())
    assert len(set(files)) == 1


@pytest.mark.parametrize("recipe", ["default", "dense", "paper", "paper-exceptions"])
@pytest.mark.parametrize("k", [5, 64])
def test_dry_run_predicts_every_byte(gguf_file: Callable[..., Path], tmp_path: Path, recipe: str, k: int) -> None:
    path = gguf_file("qwen2", hidden_size=96, kinds={DOWN: gguf.GGMLQuantizationType.Q4_0})
    out = tmp_path / "out.rkf"
    predicted = convert(path, out, recipe=recipe, k=k, dry_run=True)
    assert list(tmp_path.iterdir()) == [path]
    made = convert(path, out, recipe=recipe, k=k)
    assert predicted.file_bytes == made.file_bytes == out.stat().st_size
    assert [(row.name, row.stored_as, row.bytes) for row in predicted.rows] == [
        (row.name, row.stored_as, row.bytes) for row in made.rows
    ]
    assert predicted.source_bytes == sum(spec.stored_bytes for spec in open_source(path).tensors.values())
    assert f"{made.file_bytes:,}" in list(predicted.lines())[-1]


def test_dry_run_with_tables_and_groups(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'k = 4\n[[rule]]\ntensors = ["*down_proj*"]\nrows_per_table = 24\n'
        '[[rule]]\ntensors = ["*"]\ngrid = true\naffine = "group"\ngroup = 32\nexceptions = 0.01\n'
    )
    folder, out = hf_folder("llama"), tmp_path / "out.rkf"
    assert (
        convert(folder, out, recipe=recipe, dry_run=True).file_bytes == convert(folder, out, recipe=recipe).file_bytes
    )


def test_progress(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    steps: list[Step] = []
    ledger = convert(hf_folder("qwen2"), tmp_path / "out.rkf", progress=steps.append)
    assert [step.name for step in steps] == [row.name for row in ledger.rows]
    assert steps[-1].done == steps[-1].total == sum(row.weights for row in ledger.rows)
    errors = {step.name: step.error for step in steps}
    assert errors[DOWN] is not None
    assert 0 < errors[DOWN] < 0.05
    assert errors["model.norm.weight"] is None


def test_existing_output(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = hf_folder("llama"), tmp_path / "out.rkf"
    out.write_bytes(b"old")
    with pytest.raises(UsageError, match="--force"):
        convert(folder, out)
    assert out.read_bytes() == b"old"
    convert(folder, out, force=True)
    assert out.stat().st_size > 1000


def test_output_is_the_input(hf_folder: Callable[..., Path], gguf_file: Callable[..., Path]) -> None:
    folder, path = hf_folder("llama"), gguf_file("llama")
    for src, out in ((path, path), (folder, folder / "model.safetensors"), (folder, folder / "config.json")):
        before = out.read_bytes()
        with pytest.raises(OutputError, match="the output is the input"):
            convert(src, out, force=True)
        assert out.read_bytes() == before


def test_another_process_is_writing_it(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = hf_folder("llama"), tmp_path / "out.rkf"
    work = WorkFolder(out)
    work.path.mkdir()
    (work.path / "000000.rkf").write_bytes(b"theirs")
    with replacing(out), pytest.raises(OutputError, match="another process"):
        convert(folder, out)
    assert (work.path / "000000.rkf").read_bytes() == b"theirs"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", [DOWN, "model.norm.weight"])
def test_damaged_weights_are_named(hf_folder: Callable[..., Path], tmp_path: Path, name: str, value: float) -> None:
    folder = hf_folder("llama", "float32")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].reshape(-1)[7] = value
    save_file(tensors, folder / "model.safetensors")
    before = set(tmp_path.iterdir())
    with pytest.raises(SourceError, match=rf"{folder.name}.*{name}.*NaN or infinite"):
        convert(folder, tmp_path / "out.rkf")
    assert set(tmp_path.iterdir()) == before


def test_constant_matrix_stays_dense(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder("llama", "float32")
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN][:] = 0.5
    save_file(tensors, folder / "model.safetensors")
    convert(folder, tmp_path / "out.rkf")
    with open_file(tmp_path / "out.rkf") as file:
        assert file.tensors[DOWN].kind == "dense"


def test_arguments(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = hf_folder("llama"), tmp_path / "out.rkf"
    with pytest.raises(UsageError, match="workers"):
        convert(folder, out, workers=0)
    with pytest.raises(UsageError, match="no such recipe"):
        convert(folder, out, recipe="absent")
    with pytest.raises(UsageError, match="expected 2 to 256, got 257"):
        convert(folder, out, k=257)
    assert not out.exists()


def test_ctrl_c_leaves_nothing_unless_resuming(
    hf_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = hf_folder("llama"), tmp_path / "out.rkf"
    save, remove = WorkFolder.save, WorkFolder._empty

    def late(*arguments: Any) -> None:  # other threads are not done when the first tensor is reported
        sleep(0.05)
        save(*arguments)

    def slow(folder: WorkFolder) -> None:  # what they would write now would stay
        remove(folder)
        sleep(0.2)

    monkeypatch.setattr(WorkFolder, "save", late)
    monkeypatch.setattr(WorkFolder, "_empty", slow)

    def interrupt(step: Step) -> None:
        raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert(folder, out, progress=interrupt)
    assert set(tmp_path.iterdir()) == before
    with pytest.raises(KeyboardInterrupt):
        convert(folder, out, progress=interrupt, resume=True)
    assert set(tmp_path.iterdir()) == before | {WorkFolder(out).path}


def test_a_file_that_cannot_be_removed_for_a_moment(
    hf_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever it is, and whether it exists or not."""
    folder, out, unlink, called, fails = hf_folder("llama"), tmp_path / "out.rkf", Path.unlink, [], [0]

    def busy(path: Path, missing_ok: bool = False) -> None:
        if path.parent == WorkFolder(out).path:
            called.append(path.exists())
            if [len(called)] == fails:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", busy)
    before = set(tmp_path.iterdir())
    convert(folder, out)
    first, last = called.index(True) + 1, len(called)
    for fails[0] in (first, last):
        called.clear()
        convert(folder, out, force=True)
        assert len(called) > last and set(tmp_path.iterdir()) == before | {out}


def test_a_work_folder_that_cannot_be_removed(
    hf_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, unlink = hf_folder("llama"), tmp_path / "out.rkf", Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.parent == WorkFolder(out).path and path.exists():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OutputError, match=r"out\.rkf\.work: cannot be removed"):
        convert(folder, out)
    assert out.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_source_that_changes_is_refused(gguf_file: Callable[..., Path], tmp_path: Path, resume: bool) -> None:
    """Its size and the time of its last change may be set back."""
    source, out = gguf_file("llama"), tmp_path / "out.rkf"
    data, times = source.read_bytes(), source.stat()

    def change(step: Step) -> None:
        source.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))

    with pytest.raises(ChangedError, match=f"{source.name}: changed while it was read"):
        convert(source, out, progress=change, resume=resume)
    assert not out.exists()
    source.write_bytes(data)
    convert(source, out, resume=resume)
    convert(source, tmp_path / "again.rkf")
    assert out.read_bytes() == (tmp_path / "again.rkf").read_bytes()


KILLED = """
import os, signal, sys
from rkf.converters.pipeline import convert
steps = []
def kill(step):
    steps.append(step)
    if len(steps) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], force=True, workers=2, progress=kill)
"""


def kill_after(folder: Path, out: Path, tensors: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(out), str(tensors)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL


def test_kill_and_resume(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = hf_folder("llama"), tmp_path / "out.rkf"
    whole = tmp_path / "whole.rkf"
    convert(folder, whole)
    work = WorkFolder(out)
    kill_after(folder, out, 1)
    assert not out.exists()
    assert list(work.path.glob("*.rkf"))

    out.write_bytes(b"old")
    kill_after(folder, out, 12)
    assert out.read_bytes() == b"old"

    with pytest.raises(UsageError, match=r"belongs to another job \(recipe differs\)"):
        convert(folder, out, k=32, force=True, resume=True)
    part = sorted(work.path.glob("*.rkf"))[0]
    part.write_bytes(part.read_bytes()[:-1] + b"\0")  # damaged: it is made again
    convert(folder, out, force=True, resume=True)
    assert out.read_bytes() == whole.read_bytes()
    assert not work.path.exists()


def test_resume_takes_finished_tensors_as_they_are(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = hf_folder("llama"), tmp_path / "out.rkf"
    seen: list[Step] = []

    def interrupt(step: Step) -> None:
        seen.append(step)
        if step.name == DOWN:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, out, resume=True, progress=interrupt)
    work, number = WorkFolder(out), len(seen) - 1
    finished = work.load(number, DOWN)
    assert finished is not None
    matrix, _ = finished
    assert isinstance(matrix, ClusteredMatrix)
    work.save(number, DOWN, matrix, {"mark": 1.0})
    convert(folder, out, resume=True)
    with open_file(out) as file:
        assert file.tensors[DOWN].stats == {"mark": 1.0}


def test_work_of_another_source_is_refused_and_a_new_start_discards_it(
    hf_folder: Callable[..., Path], tmp_path: Path
) -> None:
    first, second, out = hf_folder("llama"), hf_folder("llama", "float32"), tmp_path / "out.rkf"
    work = WorkFolder(out)
    kill_after(first, out, 3)
    with pytest.raises(UsageError, match="source differs"):
        convert(second, out, resume=True)
    assert work.path.exists()
    (work.path / "job.json").write_text("?")
    with pytest.raises(UsageError, match="belongs to another job"):
        convert(first, out, resume=True)
    convert(second, out)
    assert not work.path.exists()


def test_a_folder_of_the_same_name_keeps_what_is_not_ours(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out.rkf"
    work = WorkFolder(out)
    work.path.mkdir()
    (work.path / "thesis.txt").write_text("years")
    convert(hf_folder("llama"), out)
    assert [path.name for path in work.path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("error", [SourceError, UnsupportedError])
def test_errors_of_a_source_come_through(hf_folder: Callable[..., Path], tmp_path: Path, error: type[RkfError]) -> None:
    folder = hf_folder("llama")
    if error is SourceError:
        (folder / "tokenizer.json").unlink()
    else:
        shutil.copy(folder / "config.json", folder / "copy.json")
        (folder / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(error):
        convert(folder, tmp_path / "out.rkf")
