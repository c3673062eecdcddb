"""Conversion from the hub without a copy of the checkpoint: the same bytes, little on the disk, interruptions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rkf.converters import hub_checkpoint
from rkf.converters.pipeline import convert
from rkf.converters.pull import pull
from rkf.converters.source import open_source
from rkf.errors import RkfError, SourceError, UsageError
from tests.converters.hub_server import Hub


@pytest.fixture
def checkpoint(server: Hub, hf_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint in several shards, here and on the hub."""
    monkeypatch.setenv("RKF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_checkpoint.time, "sleep", lambda seconds: None)
    folder = hf_folder("llama", shard="40KB", num_hidden_layers=3)
    server.files["user/sharded"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return folder


def weights(server: Hub) -> list[tuple[str, int]]:
    """The shards that were asked for, with the bytes."""
    found = []
    for _, path, wanted in server.requests:
        if path.endswith(".safetensors") and wanted is not None:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            found.append((path.rpartition("/")[2], last + 1 - first))
    return found


def test_the_same_bytes_and_no_copy(server: Hub, checkpoint: Path, tmp_path: Path) -> None:
    shards = {path.name: path.stat().st_size for path in checkpoint.glob("*.safetensors")}
    assert len(shards) > 3
    source = open_source("hub:user/sharded")
    on_disk = sum(path.stat().st_blocks * 512 for path in source.folder.rglob("*.safetensors"))
    assert on_disk <= max(shards.values())
    convert("hub:user/sharded", tmp_path / "remote.rkf", k=16)
    convert(pull("user/sharded"), tmp_path / "local.rkf", k=16)
    assert (tmp_path / "remote.rkf").read_bytes() == (tmp_path / "local.rkf").read_bytes()
    folder = source.folder
    del source
    assert not folder.exists()


def test_traffic(server: Hub, checkpoint: Path, tmp_path: Path) -> None:
    """Once for the hashes, which are kept, and once for the tensors."""
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    convert("hub:user/sharded", tmp_path / "first.rkf", k=16)
    assert sum(count for _, count in weights(server)) < 2.5 * size
    server.requests.clear()
    convert("hub:user/sharded", tmp_path / "second.rkf", k=16)
    assert sum(count for _, count in weights(server)) < 1.5 * size
    assert (tmp_path / "first.rkf").read_bytes() == (tmp_path / "second.rkf").read_bytes()


def test_interruptions(server: Hub, checkpoint: Path, tmp_path: Path) -> None:
    """A request that fails is sent again; a conversion that ends goes on with what it has."""
    server.failures = 3
    convert("hub:user/sharded", tmp_path / "out.rkf", k=16)
    server.requests.clear()

    def stop(step: object) -> None:
        if len(weights(server)) > 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("hub:user/sharded", tmp_path / "again.rkf", k=16, resume=True, workers=1, progress=stop)
    assert not (tmp_path / "again.rkf").exists()
    before = sum(count for _, count in weights(server))
    server.requests.clear()
    convert("hub:user/sharded", tmp_path / "again.rkf", k=16, resume=True, workers=1)
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert before > 0 and sum(count for _, count in weights(server)) < size
    assert (tmp_path / "again.rkf").read_bytes() == (tmp_path / "out.rkf").read_bytes()


def test_every_small_file_that_counts_is_fetched(server: Hub, checkpoint: Path) -> None:
    """Also those that few checkpoints have: without them there were other tokens, and no template."""
    small = {"added_tokens.json": b"{}", "additional_chat_templates/default.jinja": b"{{ messages[0].content }}"}
    server.files["user/sharded"].pop("chat_template.jinja", None)
    server.files["user/sharded"] |= small
    remote, local = open_source("hub:user/sharded"), open_source(pull("user/sharded"))
    assert remote.chat_template == local.chat_template == "{{ messages[0].content }}"
    assert small.keys() <= remote.files.keys() and remote.files == local.files


def test_refusals(server: Hub, checkpoint: Path, tmp_path: Path) -> None:
    server.files["user/other"] = {"config.json": b"{}", "model.gguf": b"GGUF"}
    server.files["user/damaged"] = {**server.files["user/sharded"]}
    shard = sorted(name for name in server.files["user/damaged"] if name.endswith(".safetensors"))[0]
    server.files["user/damaged"][shard] = os.urandom(1000)
    cases: list[tuple[str, type[RkfError], str]] = [
        ("hub:user/other", SourceError, "neither model.safetensors nor model.safetensors.index.json"),
        ("hub:user/none", SourceError, "user/none: the hub cannot be used"),
        ("hub:user/damaged", SourceError, f"user/damaged: {shard}: not a safetensors file"),
        ("hub:none", UsageError, "expected hub:USER/REPO"),
        ("hub:user/sharded:model.rkf", UsageError, "expected hub:USER/REPO"),
    ]
    for name, kind, problem in cases:
        with pytest.raises(kind, match=problem) as caught:
            convert(name, tmp_path / "out.rkf", k=16)
        assert "\n" not in str(caught.value)
    server.ranges = False
    with pytest.raises(SourceError, match="does not answer range requests"):
        convert("hub:user/sharded", tmp_path / "out.rkf", k=16)
    assert not (tmp_path / "out.rkf").exists()
