"""Strings in a file cannot control the terminal of a user who inspects it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from rkf.cli import cli
from tests.hostile.forge import mutate
from tests.spec.document import VECTORS

BELL_AND_CLEAR = "\a\x1b[2J\x9b31m\r\x7f\u202egnp.exe"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A valid file with a hostile description of itself."""
    path = tmp_path / "hostile.rkf"
    edits = {
        "directory/metadata/" + BELL_AND_CLEAR: BELL_AND_CLEAR,
        "directory/provenance/source": {"list": [BELL_AND_CLEAR], "name": BELL_AND_CLEAR},
        "directory/tensors/norm/stats": {BELL_AND_CLEAR: 1},
    }
    path.write_bytes(mutate((VECTORS / "everything.rkf").read_bytes(), edits))
    return path


@pytest.mark.parametrize(
    "arguments",
    (["info"], ["info", "--tensors"], ["info", "--json"], ["info", "--tensors", "--json"], ["footprint"], ["verify"]),
    ids=" ".join,
)
def test_nothing_unprintable(arguments: list[str], hostile: Path) -> None:
    result = CliRunner().invoke(cli, [*arguments, str(hostile)])
    assert result.exit_code == 0, result.output
    shown = result.output.replace("\n", "")
    assert shown.isprintable() and "\u202e" not in shown
