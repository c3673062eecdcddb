"""Files on the hub: fetched, looked at by range requests, compared, pushed. The client is huggingface_hub's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner, Result

import rkf.bridges.transformers as registered  # noqa: F401 - its import registers the quantizer
from rkf.cli import cli
from rkf.converters.pipeline import convert
from rkf.file.split import join
from rkf.file.verify import verify
from tests.converters.hub_server import Hub


@pytest.fixture
def small(hf_folder: Callable[..., Path], tmp_path: Path) -> Path:
    convert(hf_folder("llama"), tmp_path / "small.rkf", k=16)
    return tmp_path / "small.rkf"


def small_source(folder: Path) -> str:
    """The checkpoint that `small` was made of."""
    return next(path.name for path in folder.iterdir() if (path / "config.json").is_file())


def export_each(path: Path, out: Path) -> bytes:
    assert rkf("export", "gguf", path, out).exit_code == 0
    return out.read_bytes()


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


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's client
def test_a_model_in_parts(server: Hub, small: Path, tmp_path: Path) -> None:
    """Pushed with its parts, looked at by its index alone, fetched part by part."""
    convert(tmp_path / small_source(tmp_path), tmp_path / "parts.rkf", k=16, part_bytes=16_000)
    join(tmp_path / "parts.rkf", tmp_path / "joined.rkf")
    assert (tmp_path / "joined.rkf").read_bytes() == small.read_bytes()
    assert rkf("push", tmp_path / "parts.rkf", "user/parts:m.rkf").exit_code == 0
    stored = server.files["user/parts"]
    names = sorted(name for name in stored if name != "README.md")
    count = len(names) - 1
    assert count > 2 and names[0] == f"m-00001-of-{count:05}.rkf" and names[-1] == "m.rkf"
    assert f"{sum(map(len, stored.values())) - len(stored['README.md'])}"[:2] in stored["README.md"].decode()
    server.requests.clear()
    info = rkf("info", "user/parts:m.rkf", "--json")
    assert json.loads(info.stdout)["ranks_id"] == json.loads(rkf("info", small, "--json").stdout)["ranks_id"]
    assert len(server.requests) == 2
    assert json.loads(rkf("diff", small, "user/parts:m.rkf", "--json").stdout)["identical"]

    del stored[names[1]]  # the download ends early
    refused = rkf("pull", "user/parts")
    assert refused.exit_code == 1 and names[1] in refused.output and refused.output.count("\n") == 1
    stored[names[1]] = (tmp_path / f"parts-00002-of-{count:05}.rkf").read_bytes()
    server.requests.clear()
    fetched = Path(rkf("pull", "user/parts").stdout.strip())
    assert verify(fetched).weights == verify(small).weights
    got = [path for method, path, _ in server.requests if method == "GET" and path.endswith(".rkf")]
    assert not any(path.endswith(names[0]) for path in got) and any(path.endswith(names[1]) for path in got)

    damaged = fetched.with_name(names[2])
    data = bytearray(damaged.read_bytes())
    data[200] ^= 1
    damaged.resolve().write_bytes(data)
    server.requests.clear()
    assert rkf("pull", "user/parts").exit_code == 0
    got = [path for method, path, _ in server.requests if method == "GET" and path.endswith(".rkf")]
    assert [path.rpartition("/")[2] for path in got] == [names[2]]
    exported = [export_each(path, tmp_path / f"{number}.gguf") for number, path in enumerate((fetched, small))]
    assert exported[0] == exported[1]
    stored[names[0]], stored[names[1]] = stored[names[1]], stored[names[0]]
    server.files["user/swapped"] = stored
    refused = rkf("pull", "user/swapped")
    assert refused.exit_code == 3 and "expected part 1, got part 2" in refused.output
    answer = ("run", "--raw", "--prompt", "Hello", "--max-tokens", "2", "--temperature", "0")
    assert rkf(*answer, fetched).stdout == rkf(*answer, small).stdout


def test_transformers_loads_a_clustered_folder(server: Hub, small: Path, tmp_path: Path) -> None:
    assert rkf("export", "transformers", small, tmp_path / "clustered").exit_code == 0
    server.files["user/clustered"] = {path.name: path.read_bytes() for path in (tmp_path / "clustered").iterdir()}
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        found, expected = (
            transformers.AutoModelForCausalLM.from_pretrained(name)(ids).logits
            for name in ("user/clustered", tmp_path / "clustered")
        )
    assert torch.equal(found, expected)


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
        (("pull", "user/checkpoint"), "no checkpoint with config.json: name a file as user/checkpoint:FILE"),
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
