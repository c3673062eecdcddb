"""Conversion with calibration, end to end on a tiny checkpoint."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import rkf
from rkf.calibration import Calibrate, prompts, save
from rkf.cli import cli
from rkf.converters.pipeline import convert
from rkf.converters.source import open_source
from rkf.errors import UsageError

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 40


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration texts that a test has time for."""
    _shorten(monkeypatch)


def _shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkf.calibration.CTX", 24)
    monkeypatch.setattr("rkf.calibration.WRITTEN_CTX", 24)
    monkeypatch.setattr("rkf.calibration._LOST", 4)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("tied", [True, False])
def test_outputs_are_nearer_to_the_sources(hf_folder: Callable[..., Path], tmp_path: Path, tied: bool) -> None:
    folder = hf_folder("llama", tie_word_embeddings=tied)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    calibrate = Calibrate(tmp_path / "text")
    convert(folder, tmp_path / "plain.rkf", k=8)
    convert(folder, tmp_path / "suited.rkf", k=8, calibrate=calibrate)
    source = open_source(folder)
    with rkf.open(tmp_path / "plain.rkf") as plain, rkf.open(tmp_path / "suited.rkf") as suited:
        assert suited.provenance["calibration"] == calibrate(source).provenance
        assert plain.provenance["calibration"] == "none"
        seen = {}
        for moments in calibrate(source).moments():
            seen |= {source.aliases.get(name, name): each for name, each in moments.items()}
        assert ("model.embed_tokens.weight" in seen) == tied
        ratios = []
        for name, moment in seen.items():
            dense = source.read(name).decode()
            costs = []
            for file in (suited, plain):
                error = (file.decode(name) - dense).astype(np.float64)
                costs.append(np.einsum("rc,cd,rd->", error, moment, error))
            ratios.append(costs[0] / costs[1])
        assert max(ratios) < 1
        assert np.mean(ratios) < 0.8


@pytest.mark.usefixtures("short")
def test_bytes_do_not_depend_on_workers_or_interruptions(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder("llama")
    for workers in (1, 3):
        convert(folder, tmp_path / f"{workers}.rkf", k=8, workers=workers, calibrate=Calibrate())
    assert (tmp_path / "1.rkf").read_bytes() == (tmp_path / "3.rkf").read_bytes()

    calls = []

    def interrupt(step: object) -> None:
        calls.append(step)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "cut.rkf", k=8, calibrate=Calibrate(), resume=True, progress=interrupt)
    with pytest.raises(UsageError, match="calibration differs"):
        convert(folder, tmp_path / "cut.rkf", k=8, resume=True)
    convert(folder, tmp_path / "cut.rkf", k=8, calibrate=Calibrate(), resume=True)
    assert (tmp_path / "1.rkf").read_bytes() == (tmp_path / "cut.rkf").read_bytes()


@pytest.mark.usefixtures("short")
def test_a_dry_run_knows_the_size(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = hf_folder("llama"), tmp_path / "out.rkf"
    predicted = convert(folder, out, k=8, calibrate=Calibrate(), dry_run=True)
    assert convert(folder, out, k=8, calibrate=Calibrate()).file_bytes == predicted.file_bytes


@pytest.mark.usefixtures("short")
def test_kept_tokens_are_the_same_calibration(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder("llama")
    source = open_source(folder)
    made = Calibrate()(source)
    save(tmp_path / "tokens", made.tokens)
    kept = Calibrate(tmp_path / "tokens")(source)
    np.testing.assert_array_equal(kept.tokens, made.tokens)
    assert kept.provenance["tokens_blake3"] == made.provenance["tokens_blake3"]
    for row, prompt in zip(made.tokens[::2], prompts(source)[::2], strict=True):
        assert row[: len(prompt)].tolist() == prompt[:24]
    for row, prompt in zip(made.tokens[1::2], prompts(source)[1::2], strict=True):
        assert row[: max(len(prompt) - 4, 0)].tolist() == prompt[4:28]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "expected UTF-8"),
        (b"short", "expected 512 at least"),
        (b"RKFTOKENS1\n\x05\0\0\0\1\0\0\0", "damaged"),
        (b"RKFTOKENS1\n\1\0\0", "damaged"),
        (b"RKFTOKENS1\n\1\0\0\0\0\0\0\x7f", "another model"),
    ],
)
def test_texts_that_are_none(hf_folder: Callable[..., Path], tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        Calibrate(tmp_path / "text")(open_source(hf_folder("llama", max_position_embeddings=512)))


def test_the_commands(hf_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _shorten(monkeypatch)
    folder, tokens = str(hf_folder("llama")), str(tmp_path / "tokens")
    for arguments in (
        ["calibrate", folder, tokens],
        ["convert", folder, str(tmp_path / "a.rkf"), "--calibrate", tokens],
        ["convert", folder, str(tmp_path / "b.rkf"), "--calibrate", "self"],
    ):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
    result = CliRunner().invoke(cli, ["convert", folder, str(tmp_path / "c.rkf"), "--calibrate", "wiki"])
    assert result.exit_code == 2
    assert "no such file" in result.output
    with rkf.open(tmp_path / "a.rkf") as a, rkf.open(tmp_path / "b.rkf") as b:
        assert a.ranks_id == b.ranks_id
