"""Folders of strangers: files of another kind, encoding, size or name than expected are read or refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from rkf.cli import cli
from rkf.converters.generation import generation_of
from rkf.converters.input_files import MAX_JSON_BYTES
from rkf.converters.source import open_source
from rkf.errors import MOST_MESSAGE, NotRkfError, RkfError, SourceError, UnsupportedError
from tests.fuzz import seeds

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return seeds.write_checkpoint(tmp_path / "hf")


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **keys}))


def shards(folder: Path) -> dict[str, Any]:
    """The checkpoint in two files; its index."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    index: dict[str, Any] = {"weight_map": {}}
    for number in range(2):
        part = {name: tensors[name] for name in sorted(tensors)[number::2]}
        save_file(part, folder / f"part-{number}.safetensors")
        index["weight_map"] |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    return index


def test_two_tokens_of_one_id_make_no_file_that_cannot_be_run(folder: Path) -> None:
    said = json.loads((folder / "tokenizer.json").read_bytes())
    said["model"]["vocab"]["another"] = 5
    (folder / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(SourceError, match=r"^hf: tokenizer.json has 401 tokens for 400 rows: two of them share an id$"):
        open_source(folder)
    (folder / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(NotRkfError, match=r"tokenizer\.json: a Git LFS pointer"):
        open_source(folder)


def test_a_huge_id_is_refused_before_it_takes_memory(folder: Path) -> None:
    """Tokens of other files are added to tokenizer.json, which the library then writes."""
    said = json.loads((folder / "tokenizer.json").read_bytes())
    said["model"]["vocab"]["another"] = 1 << 29
    (folder / "tokenizer.json").write_text(json.dumps(said))
    (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": 400}))
    with pytest.raises(SourceError, match=r"^hf: tokenizer\.json: expected ids of at most 4194304, got 536870912$"):
        open_source(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (json.dumps(seeds.CONFIG).encode("utf-16"), "not JSON"),
        (b"\xef\xbb\xbf" + json.dumps(seeds.CONFIG).encode(), "not JSON"),
        (b"{" + b" " * MAX_JSON_BYTES + b"}", f"expected at most {MAX_JSON_BYTES}"),
        (POINTER, "a Git LFS pointer: fetch the file itself"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b'{"a":' + b"[" * 100_000, "not JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"", "not JSON"),
    ],
)
def test_json_of_another_kind(folder: Path, name: str, content: bytes, problem: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises((SourceError, NotRkfError), match=problem) as refused:
        open_source(folder)
    assert str(refused.value).startswith(f"{folder / name}: ")


@pytest.mark.parametrize(
    "shard",
    [None, 1, {"a": 1}, "../model.safetensors", "/model.safetensors", "x.bin", "\ud800.safetensors", "a" * 300, ""],
)
def test_names_of_shards(folder: Path, shard: Any) -> None:
    index = shards(folder)
    index["weight_map"]["a"] = shard if not isinstance(shard, str) or shard[:1] != "a" else f"{shard}.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(SourceError, match="is not the plain name of a safetensors file"):
        open_source(folder)


def linked(folder: Path) -> None:
    """As in the hub's cache."""
    shard = folder / "part-0.safetensors"
    shard.rename(folder.parent / "blob")
    shard.symlink_to("../blob")


def pointer(folder: Path) -> None:
    (folder / "part-0.safetensors").write_bytes(POINTER)


def twice(folder: Path) -> None:
    (folder / "part-0.safetensors").unlink()
    (folder / "part-0.safetensors").hardlink_to(folder / "part-1.safetensors")


def endless(folder: Path) -> None:
    (folder / "part-0.safetensors").unlink()
    (folder / "part-0.safetensors").symlink_to("/dev/zero")


def piped(folder: Path) -> None:
    (folder / "part-0.safetensors").unlink()
    os.mkfifo(folder / "part-0.safetensors")


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (linked, None),
        (pointer, "part-0.safetensors: a Git LFS pointer"),
        (twice, "occurs in part-1.safetensors and in a shard before it"),
        (endless, "shard part-0.safetensors is missing"),
        (piped, "shard part-0.safetensors is missing"),
    ],
)
def test_files_of_shards(folder: Path, edit: Callable[[Path], None], problem: str | None) -> None:
    shards(folder)
    edit(folder)
    if problem is None:
        assert open_source(folder).tensors
        return
    with pytest.raises((SourceError, NotRkfError), match=problem):
        open_source(folder)


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("temperature", -1, None),
        ("temperature", 0, 0),
        ("temperature", True, None),
        ("temperature", "0.7", None),
        ("top_k", 40.5, None),
        ("top_k", -1, -1),
        ("top_k", 10**400, None),
        ("top_p", 2, None),
        ("top_p", 0, None),
        ("min_p", -0.1, None),
        ("repetition_penalty", 0, None),
        ("repetition_penalty", float("nan"), None),
    ],
)
def test_a_recommended_option_that_means_nothing_is_ignored_and_said(
    folder: Path, key: str, value: Any, kept: float | None
) -> None:
    change(folder / "generation_config.json", do_sample=True, **{key: value})
    found = generation_of(folder)
    default = {"temperature": 1.0, "top_k": 50.0}.get(key)
    assert found.options.get(key) == (default if kept is None else kept)
    assert [key in note and "it is ignored" in note for note in found.notes] == ([True] if kept is None else [])


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": LONG},
        {"hidden_act": LONG},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": LONG}},
        {"quantization_config": {"quant_method": LONG}},
    ],
)
def test_a_long_value_does_not_make_a_long_line(folder: Path, keys: dict[str, Any]) -> None:
    change(folder / "config.json", **keys)
    with pytest.raises((SourceError, UnsupportedError)) as refused:
        open_source(folder)
    assert len(str(refused.value)) <= MOST_MESSAGE and str(refused.value).startswith("hf: ")
    done = CliRunner().invoke(cli, ["convert", str(folder), str(folder.parent / "m.rkf")])
    assert done.exit_code in (1, 4) and done.output.count("\n") == 1 and len(done.output) < MOST_MESSAGE + 10


def test_the_end_of_a_long_message_says_what_to_do() -> None:
    told = str(RkfError(f"file: got {LONG}: remove it"))
    assert len(told) == MOST_MESSAGE and told.startswith("file: got x") and told.endswith("x: remove it")
