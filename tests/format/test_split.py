"""A model in parts: what it says is what the whole file says, and no writer leaves a mixture behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import rkf
from rkf.cli import cli
from rkf.errors import OutputError, UsageError
from rkf.file.archive import pack, unpack
from rkf.file.container import files_of, total_bytes
from rkf.file.diff import diff
from rkf.file.edit import edit
from rkf.file.footprint import footprint
from rkf.file.split import join, split
from rkf.file.values import write_values
from rkf.file.verify import verify
from rkf.format.constants import aligned
from tests.spec.document import VECTORS

MODELS = ("affine.rkf", "everything.rkf", "free.rkf", "names.rkf", "packed.rkf", "program-rotated.rkf", "zstd.rkf")


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in arguments])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part_bytes", (129, 2000, 1 << 20))
def test_join_undoes_split(name: str, part_bytes: int, tmp_path: Path) -> None:
    split(VECTORS / name, tmp_path / "m.rkf", part_bytes=part_bytes)
    join(tmp_path / "m.rkf", tmp_path / "joined.rkf")
    assert (tmp_path / "joined.rkf").read_bytes() == (VECTORS / name).read_bytes()
    with rkf.open(VECTORS / name) as whole, rkf.open(tmp_path / "m.rkf") as parted:
        assert (parted.ranks_id, parted.dense_id, parted.metadata) == (whole.ranks_id, whole.dense_id, whole.metadata)
        for each in whole.tensors:
            assert parted.decode(each).tobytes() == whole.decode(each).tobytes()
        for each in whole.directory.blobs:
            assert parted.blob(each) == whole.blob(each)
        for entry in parted.directory.parts:
            end = aligned(entry.sections[-1].offset + entry.sections[-1].length)
            assert len(entry.sections) == 1 or end <= aligned(part_bytes)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    split(VECTORS / "everything.rkf", tmp_path / "m.rkf", part_bytes=1000)
    return tmp_path / "m.rkf"


def test_everything_that_reads_a_file_reads_parts(parts: Path, tmp_path: Path) -> None:
    whole = VECTORS / "everything.rkf"
    assert verify(parts).weights == verify(whole).weights
    assert diff(whole, parts)["identical"]
    ledger = footprint(parts)
    assert ledger["file_bytes"] == total_bytes(parts) == sum(path.stat().st_size for path in files_of(parts))
    assert sum(ledger["sections"].values()) == ledger["file_bytes"]
    told = json.loads(command("info", parts, "--json").stdout)
    assert told["parts"] == [path.stat().st_size for path in files_of(parts)[1:]]
    pack(parts, tmp_path / "packed.rkf")
    unpack(tmp_path / "packed.rkf", tmp_path / "unpacked.rkf")
    assert (tmp_path / "unpacked.rkf").read_bytes() == whole.read_bytes()
    with rkf.open(parts) as container:
        write_values(tmp_path / "v.rkv", container, {})
    rkf.open(whole, values=tmp_path / "v.rkv").close()
    split(parts, tmp_path / "other.rkf", part_bytes=2000)
    assert diff(tmp_path / "other.rkf", parts)["identical"] and len(files_of(tmp_path / "other.rkf")) == 3


def test_commands(tmp_path: Path) -> None:
    done = command("split", VECTORS / "everything.rkf", tmp_path / "m.rkf", "--part-size", "1kB")
    assert done.exit_code == 0 and "5 parts, m-00001-of-00005.rkf to m-00005-of-00005.rkf" in done.output
    part = command("verify", tmp_path / "m-00002-of-00005.rkf")
    assert part.exit_code == 0 and "valid: part 2 of m.rkf, 1 sections" in part.output
    assert command("join", tmp_path / "m.rkf", tmp_path / "whole.rkf").exit_code == 0
    assert (tmp_path / "whole.rkf").read_bytes() == (VECTORS / "everything.rkf").read_bytes()
    for wrong, problem in (
        (("run", tmp_path / "m-00002-of-00005.rkf", "--prompt", "a"), "is one part of a model: open m.rkf"),
        (("join", VECTORS / "everything.rkf", tmp_path / "n.rkf"), "expected the index of a model in parts"),
        (("split", VECTORS / "tuned.rkv", tmp_path / "n.rkf", "--part-size", "1kB"), "never in parts"),
        (("split", VECTORS / "everything.rkf", tmp_path / "n.rkf", "--part-size", "100"), "expected more than 128"),
    ):
        refused = command(*wrong)
        assert refused.exit_code == 2 and problem in refused.output and refused.output.count("\n") == 1, refused.output
    assert not list(tmp_path.glob("n*"))


def test_edits_ask_for_a_whole_file(parts: Path) -> None:
    with pytest.raises(UsageError, match="rkf join"):
        edit(parts, provenance={})


def test_old_parts(parts: Path, tmp_path: Path) -> None:
    """They are kept, or replaced by --force, or, if their index is gone, what a killed writer left."""
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="exists already"):
        split(VECTORS / "zstd.rkf", parts, part_bytes=1000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    split(VECTORS / "zstd.rkf", parts, part_bytes=1000, force=True)
    rkf.open(parts).close()
    parts.unlink()
    (tmp_path / ".m.rkf.part-00007.partial").write_bytes(b"left by a killed writer")
    split(VECTORS / "everything.rkf", parts, part_bytes=1000)
    assert {path.name for path in tmp_path.iterdir()} >= before.keys()
    assert not list(tmp_path.glob(".*"))
    assert parts.read_bytes() == before["m.rkf"]


@pytest.mark.parametrize("at", range(1, 7))
def test_a_rename_that_fails(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left, whichever of the five parts and the index cannot be renamed."""
    real, count = os.replace, [0]

    def failing(*paths: str) -> None:
        count[0] += 1
        if count[0] == at:
            raise OSError(28, "No space left on device")
        real(*paths)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OutputError, match="free some space"):
        split(VECTORS / "everything.rkf", tmp_path / "m.rkf", part_bytes=1000)
    assert not list(tmp_path.glob(".*.partial")) and not (tmp_path / "m.rkf").exists()
    assert at == 6 or not list(tmp_path.iterdir())
    split(VECTORS / "everything.rkf", tmp_path / "m.rkf", part_bytes=1000)
    rkf.open(tmp_path / "m.rkf").close()


def test_files_that_are_no_parts_are_never_replaced(tmp_path: Path) -> None:
    """Neither a text nor a model with the name of a part, not even the source, and by no --force."""
    source = tmp_path / "m-00001-of-00005.rkf"
    source.write_bytes((VECTORS / "everything.rkf").read_bytes())
    for path, content in ((source, source.read_bytes()), (tmp_path / "m-00003-of-00005.rkf", b"precious")):
        path.write_bytes(content)
        for force in (False, True):
            with pytest.raises(UsageError, match=rf"{path.name}: exists already and is no part"):
                split(
                    VECTORS / "everything.rkf" if path is not source else source,
                    tmp_path / "m.rkf",
                    part_bytes=1000,
                    force=force,
                )
        assert path.read_bytes() == content
        assert sorted(tmp_path.iterdir()) == [path]
        path.unlink()
    source.mkdir()
    with pytest.raises(UsageError, match=f"{source.name}: exists already and is no part"):
        split(VECTORS / "everything.rkf", tmp_path / "m.rkf", part_bytes=1000)
    assert sorted(tmp_path.iterdir()) == [source]


def test_a_link_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "m.rkf").symlink_to(tmp_path / "elsewhere.rkf")
    with pytest.raises(UsageError, match=r"m\.rkf: a link cannot be the index"):
        split(VECTORS / "everything.rkf", tmp_path / "m.rkf", part_bytes=1000, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.rkf"]
