"""Files on the hub: fetched, looked at by range requests, compared, pushed. The client is huggingface_hub's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from rkf.cli import cli
from rkf.converters.pipeline import convert
from tests.converters.hub_server import Hub, hub


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield running


@pytest.fixture
def small(hf_folder: Callable[..., Path], tmp_path: Path) -> Path:
    convert(hf_folder("llama"), tmp_path / "small.rkf", k=16)
    return tmp_path / "small.rkf"


def rkf(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in arguments])


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's client
def test_a_model_is_pushed_and_fetched(server: Hub, small: Path, tmp_path: Path) -> None:
    (tmp_path / "encyclopedia.json").write_text(json.dumps({"ppl": 17.6, "ppl_stderr": 0.8}))
    pushed = rkf("push", small, "user/small", "--licence", "apache-2.0", "--quality", tmp_path / "encyclopedia.json")
    assert pushed.exit_code == 0, pushed.output
    stored = server.files["user/small"]
    assert stored["small.rkf"] == small.read_bytes()
    card = stored["README.md"].decode()
    assert "license: apache-2.0" in card and "rkf run user/small:small.rkf" in card
    assert "## Measured: encyclopedia" in card and "| ppl | 17.6 |" in card
    for name in ("user/small", "user/small:small.rkf"):
        fetched = rkf("pull", name)
        assert Path(fetched.stdout.strip()).read_bytes() == small.read_bytes(), fetched.output
    answer = rkf("run", "user/small", "--raw", "--prompt", "Hello", "--max-tokens", "2", "--temperature", "0")
    assert answer.exit_code == 0, answer.output
    assert (
        rkf("run", small, "--raw", "--prompt", "Hello", "--max-tokens", "2", "--temperature", "0").stdout
        == answer.stdout
    )


def test_a_card_is_printed(small: Path) -> None:
    printed = rkf("push", small, "user/small", "--dry-run")
    assert printed.exit_code == 0 and printed.stdout.startswith("---\nlibrary_name: rkf\n")
    assert "bits per weight" in printed.stdout and "description =" in printed.stdout  # of the recipe


def test_info_takes_two_requests(server: Hub, small: Path) -> None:
    server.files["user/small"] = {"small.rkf": small.read_bytes()}
    found = rkf("info", "user/small:small.rkf", "--json", "--tensors")
    assert found.exit_code == 0, found.output
    local, remote = json.loads(rkf("info", small, "--json", "--tensors").stdout), json.loads(found.stdout)
    assert {**remote, "path": ""} == {**local, "path": ""}
    assert [method for method, _, _ in server.requests] == ["GET", "GET"]
    ranges = [wanted for _, _, wanted in server.requests]
    assert ranges[0] == "bytes=0-127" and ranges[1] is not None
    first, last = map(int, ranges[1].removeprefix("bytes=").split("-"))
    assert last == small.stat().st_size - 1 and last - first < last // 2
    assert rkf("verify", "user/small:small.rkf", "--structure").stdout.startswith(
        "user/small:small.rkf: valid structure"
    )


def test_a_remote_file_is_compared(server: Hub, small: Path, tmp_path: Path, hf_folder: Callable[..., Path]) -> None:
    server.files["user/small"] = {"small.rkf": small.read_bytes()}
    same = json.loads(rkf("diff", small, "user/small:small.rkf", "--json").stdout)
    assert same["identical"] and same["same_ranks"] and same["same_values"]
    convert(hf_folder("llama"), tmp_path / "other.rkf", k=32)
    other = json.loads(rkf("diff", tmp_path / "other.rkf", "user/small:small.rkf", "--json").stdout)
    assert not other["identical"] and {"k", "data"} <= set(other["tensors"]["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("pull", "user/two"), "choose one of a.rkf, b.rkf as user/two:FILE"),
        (("pull", "user/none"), "user/none: the hub cannot be used"),
        (("info", "user/two:a.rkf"), "user/two:a.rkf: expected an rkf file"),
        (("info", "user/two:c.rkf"), "user/two:c.rkf: the hub cannot be used"),
        (("pull", "user/two:b.rkf"), "structure"),
        (("run", "user/checkpoint:m.gguf", "--prompt", "a"), "is a checkpoint and no .rkf file: use `rkf convert"),
        (("push", "small.rkf", "not a name"), "expected USER/REPO"),
    ],
)
def test_refusals(
    server: Hub, small: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], problem: str
) -> None:
    monkeypatch.chdir(small.parent)
    data = small.read_bytes()
    server.files["user/two"] = {"a.rkf": b"no such thing" * 100, "b.rkf": data[: len(data) // 2]}
    server.files["user/checkpoint"] = {"m.gguf": b"GGUF"}
    refused = rkf(*arguments)
    assert refused.exit_code != 0 and refused.output.count("\n") == 1, refused.output
    if problem != "structure":
        assert problem in refused.output


def test_a_hub_without_ranges(server: Hub, small: Path) -> None:
    server.files["user/small"], server.ranges = {"small.rkf": small.read_bytes()}, False
    assert "does not answer range requests" in rkf("info", "user/small:small.rkf").output


def test_an_existing_path_wins(server: Hub, small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "small").write_bytes(small.read_bytes())
    assert rkf("info", "user/small", "--json").exit_code == 0
    assert server.requests == []
