"""A budget is kept, used fully, and spent where it reduces the loss most."""

from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
from click.testing import CliRunner

import rkf
from rkf.cli import cli
from rkf.cluster import allocation
from rkf.commands.quantities import byte_count
from rkf.converters.pipeline import convert
from rkf.errors import UsageError
from rkf.file.archive import pack
from tests.runtime import tiny

SHAPES = {f"model.layers.{n}.{kind}.weight": (64, 64) for n in range(6) for kind in ("self_attn.v_proj", "mlp.up_proj")}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPES[EMBEDDING] = (512, 64)
PROGRAM = tiny.config(layers=6).program(tiny.weights(tiny.config(layers=6)))


def expected(head: str) -> dict[str, float]:
    return allocation.expected_losses(PROGRAM, SHAPES, head)


def ordered(shapes: dict[str, tuple[int, ...]], losses: dict[str, float]) -> list[str]:
    return [name for name, _ in allocation.steps(shapes, losses, allocation.ladders(shapes))]


def test_every_matrix_moves_through_every_k() -> None:
    embeddings = allocation.lone_embeddings(PROGRAM, HEAD)
    assert embeddings == {EMBEDDING}
    assert not allocation.lone_embeddings(PROGRAM, EMBEDDING)  # as it is stored if the head is tied
    allowed = allocation.ladders(SHAPES, embeddings)
    steps = [name for name, _ in allocation.steps(SHAPES, expected(HEAD), allowed)]
    recipe = allocation.recipe(PROGRAM, allowed, steps)
    assert {recipe.rule(name, shape).k for name, shape in SHAPES.items()} == {allocation.KS[-1]}
    least = allocation.recipe(PROGRAM, allowed, [])
    assert [least.rule(name, shape).k for name, shape in SHAPES.items()] == [*[allocation.KS[1]] * 12, allocation.KS[0]]


def test_the_sensitive_come_first() -> None:
    losses = expected(EMBEDDING)
    steps = ordered(SHAPES, losses)
    first = {name: steps.index(name) for name in SHAPES}
    assert first["model.layers.3.self_attn.v_proj.weight"] < first["model.layers.3.mlp.up_proj.weight"]
    assert first["model.layers.5.mlp.up_proj.weight"] < first["model.layers.1.mlp.up_proj.weight"]
    untied = ordered(SHAPES, expected(HEAD))
    assert untied.index(EMBEDDING) > first[EMBEDDING]
    losses["model.layers.2.mlp.up_proj.weight"] *= 1e6
    measured = ordered(SHAPES, losses)
    assert measured[: len(allocation.KS) - 2] == ["model.layers.2.mlp.up_proj.weight"] * (len(allocation.KS) - 2)


def test_the_last_bit_gains_less() -> None:
    steps = ordered({"a": (64, 64), "b": (64, 64)}, {"a": 4.0, "b": 1.0})
    assert "".join(steps) == "aabababbab"  # 8 to 255: the last of each halves the error, the others quarter it


def test_steps_of_several_bits_count_them_all() -> None:
    allowed = allocation.ladders(["a", "b"], ["b"], "avx2")
    assert allowed == {"a": (16, 255), "b": allocation.KS}
    found = allocation.steps({"a": (64, 64), "b": (64, 64)}, {"a": 1.0, "b": 1.0}, allowed)
    assert dict(found)["a"] == 64 * 64 // 2 + 12 * 239
    assert [name for name, _ in found].index("a") == 3  # its four bits gain less than one bit at K = 4, 8 and 16 each


def test_tables_of_all_experts_are_counted() -> None:
    allowed = allocation.ladders(["a"])
    (first, one), *_ = allocation.steps({"a": (64, 64)}, {"a": 1.0}, allowed)
    (_, many), *_ = allocation.steps({"a": (8, 8, 64)}, {"a": 1.0}, allowed)
    assert first == "a"
    assert many - one == 7 * 12 * (allocation.KS[2] - allocation.KS[1])


def test_what_does_not_fit_makes_room_for_what_does() -> None:
    assert allocation.within([("a", 5), ("b", 9), ("b", 1), ("c", 4), ("a", 2)], 10) == ["a", "c"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_a_size_is_kept_and_used(hf_folder: Callable[..., Path], tmp_path: Path, share: float) -> None:
    folder, out = hf_folder("llama"), tmp_path / "out.rkf"
    large = convert(folder, out, size=10**9, dry_run=True).file_bytes
    with pytest.raises(UsageError, match="at least") as refused:
        convert(folder, out, size=1)
    small = int(str(refused.value).split()[-2])
    wanted = int(small + share * (large - small))
    ledger = convert(folder, out, size=wanted)
    assert out.stat().st_size == ledger.file_bytes <= wanted
    assert ledger.file_bytes > wanted - 0.1 * (large - small) - 200


def test_bits_are_kept(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = hf_folder("llama"), tmp_path / "out.rkf"
    result = CliRunner().invoke(cli, ["convert", str(folder), str(out), "--bpw", "9", "--calibrate", "none"])
    assert result.exit_code == 0, result.output
    assert "bits per clustered weight" in result.output
    assert convert(folder, out, bpw=9, force=True).clustered_bits_per_weight <= 9
    with pytest.raises(UsageError, match="at least"):
        convert(folder, out, bpw=1, force=True)
    with pytest.raises(UsageError, match="exclude"):
        convert(folder, out, bpw=9, k=16, force=True)
    with rkf.open(out) as file:
        assert file.provenance["recipe"]["name"] == "budget"


def test_a_budget_for_a_cpu(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = hf_folder("llama", tie_word_embeddings=False), tmp_path / "out.rkf"
    command = ["convert", str(folder), str(out), "--bpw", "9", "--for", "avx2", "--calibrate", "none"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    with rkf.open(out) as file:
        found = {name: entry.k for name, entry in file.tensors.items() if entry.kind == "clustered"}
    assert {k for name, k in found.items() if name != EMBEDDING} <= {16, 255}
    for wrong in ({"k": 16}, {}, {"bpw": 9.0, "archive": True}):
        with pytest.raises(UsageError, match="size or bpw"):
            convert(folder, out, cpu="avx2", force=True, **wrong)
    with pytest.raises(UsageError, match="avx2"):
        convert(folder, out, cpu="z80", bpw=9.0, force=True)


def test_an_archive_takes_what_was_asked_for(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder("llama", hidden_size=256, intermediate_size=512)
    out, packed = tmp_path / "out.rkf", tmp_path / "packed.rkf"
    convert(folder, out, bpw=4.5, archive=True)
    with rkf.open(out) as file:
        clustered = [entry for entry in file.tensors.values() if entry.kind == "clustered"]
        weights = sum(prod(entry.shape) for entry in clustered)
        bits = sum(prod(entry.shape) * entry.stats["entropy_bits"] for entry in clustered) / weights
        assert 3 < bits < 4.5
        assert file.provenance["recipe"]["name"] == "archive"
    pack(out, packed)
    size = packed.stat().st_size + 20_000
    convert(folder, out, size=size, archive=True, force=True)
    pack(out, packed, force=True)
    assert 0.85 * size < packed.stat().st_size <= 1.01 * size
    with pytest.raises(UsageError, match="too small"):
        convert(folder, out, bpw=1, archive=True, force=True)
    with pytest.raises(UsageError, match="size or bpw"):
        convert(folder, out, archive=True, force=True)


@pytest.mark.parametrize(
    ("text", "expected"), [("91MB", 91_000_000), ("1.2 GB", 1_200_000_000), ("500", 500), ("7k", 7000)]
)
def test_sizes(text: str, expected: int) -> None:
    assert byte_count(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1e6", "3 MiB", "0", "0.0GB", "٣MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="expected a size"):
        byte_count(text)
