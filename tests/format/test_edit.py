"""Edits of metadata: a new file each time, tensors at their old places."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rkf
from rkf.errors import OutputError, StructureError, UsageError
from rkf.file.edit import edit
from rkf.file.values import write_values
from rkf.file.writer import Writer
from tests.format import build
from tests.format.first_form_metadata import metadata_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return build.write_model(tmp_path / "m.rkf")


def offsets(path: Path) -> list[tuple[str, int, bytes]]:
    with rkf.open(path) as container:
        return [(s.kind, s.offset, s.hash) for s in container.sections if s.kind != "blob"]


def test_a_chat_template_is_replaced(path: Path) -> None:
    before = offsets(path)
    edit(path, blobs={"chat_template.jinja": b"longer than before: {{ messages }}" * 9, "x-note": b"hello"})
    assert offsets(path) == before
    with rkf.open(path) as container:
        assert container.blob("chat_template.jinja") == b"longer than before: {{ messages }}" * 9
        assert container.blob("x-note") == b"hello"
        assert container.blob("tokenizer.json") == build.TOKENIZER
        assert container.provenance == {"source": "random"}
    edit(path, blobs={"chat_template.jinja": None, "x-note": None})
    with rkf.open(path) as container:
        assert container.blob("chat_template.jinja") is None


def test_an_edit_to_what_was_there_is_the_same_file(path: Path) -> None:
    before = path.read_bytes()
    edit(path, provenance={"source": "random"}, blobs=build.BLOBS)
    assert path.read_bytes() == before


def test_metadata_is_replaced_in_another_file(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    model = metadata_of(build.CONFIG) | {"context_length": 128}
    edit(path, output=tmp_path / "new.rkf", metadata={"model": model, "title": "tiny"}, provenance={})
    assert path.read_bytes() == before
    with rkf.open(tmp_path / "new.rkf") as container:
        assert container.model is not None
        assert container.model.context_length == 128
        assert (container.metadata["title"], container.provenance) == ("tiny", {})
    with pytest.raises(UsageError, match="--force"):
        edit(path, output=tmp_path / "new.rkf")
    edit(path, output=tmp_path / "new.rkf", force=True)
    assert (tmp_path / "new.rkf").read_bytes() == before


def test_an_edit_that_breaks_the_file_is_refused(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    model = metadata_of(build.CONFIG)
    for changes in (
        {"blobs": {"tokenizer.json": None}},
        {"blobs": {"weights.py": b"1"}},
        {"blobs": {"x-empty": b""}},
        {"metadata": {"model": model | {"vocab_size": 39}}},
    ):
        with pytest.raises(StructureError, match=r"m\.rkf: "):
            edit(path, **changes)
    with pytest.raises(UsageError, match=r"metadata\.a: "):
        edit(path, metadata={"a": None})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.rkf"]


def test_values_files_and_files_without_sections(path: Path, tmp_path: Path) -> None:
    with rkf.open(path) as model:
        write_values(tmp_path / "v.rkv", model, {})
    edit(tmp_path / "v.rkv", provenance={"by": "hand"})
    with rkf.open(path, values=tmp_path / "v.rkv") as container:
        assert container.order == "ascending"
    with Writer(tmp_path / "empty.rkf", metadata={}, provenance={}):
        pass
    edit(tmp_path / "empty.rkf", metadata={"a": 1}, blobs={"x-a": b"1"})
    with rkf.open(tmp_path / "empty.rkf") as container:
        assert (container.metadata, container.blob("x-a")) == ({"a": 1}, b"1")


def test_without_copy_file_range_the_bytes_are_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def refused(*_: Any) -> int:
        raise OSError(errno.EXDEV, "between file systems")

    monkeypatch.setattr(os, "copy_file_range", refused)
    edit(path)
    assert path.read_bytes() == before


def test_a_file_replaced_meanwhile_is_refused(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = build.write_model(tmp_path / "other.rkf", seed=1)
    opened = rkf.file.edit.open_file

    def replaced(name: Path) -> Any:
        container = opened(name)
        os.replace(other, path)  # noqa: PTH105
        return container

    monkeypatch.setattr(rkf.file.edit, "open_file", replaced)
    with pytest.raises(OutputError, match="replaced by another process"):
        edit(path)
    with rkf.open(path) as container:
        assert np.isfinite(container.decode("lm_head.weight")).all()


def test_a_file_cut_while_it_is_copied_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    with pytest.raises(OutputError, match="shorter"):
        edit(path)
    rkf.open(path).close()
