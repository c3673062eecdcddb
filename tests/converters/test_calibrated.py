"""Conversion with calibration, end to end on a tiny checkpoint."""

import io
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import rkf
from rkf.calibrate.calibration import SHORT, Calibrate, prompts
from rkf.calibrate.kept import KIND, KeptCalibration, save
from rkf.cli import cli
from rkf.cluster import allocation
from rkf.converters.pipeline import convert
from rkf.converters.rotated_source import RotatedSource
from rkf.converters.source import open_source
from rkf.errors import UsageError
from rkf.file.arrays import packed_arrays
from rkf.format import codec
from rkf.model.rotation import rotations
from rkf.numbers.hadamard_blocks import transformed
from rkf.text.tokenizer import Tokenizer
from tests.families import models

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 40


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration texts that are short enough for a test."""
    _shorten(monkeypatch)


def _shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkf.calibrate.calibration.CTX", 24)
    monkeypatch.setattr("rkf.calibrate.calibration._LEAST", 32 * 24)
    monkeypatch.setattr("rkf.calibrate.calibration.WRITTEN_CTX", 24)
    monkeypatch.setattr("rkf.calibrate.calibration._LOST", 4)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("tied", [True, False])
def test_outputs_are_nearer_to_the_sources(hf_folder: Callable[..., Path], tmp_path: Path, tied: bool) -> None:
    folder = hf_folder("llama", tie_word_embeddings=tied)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    calibrate = Calibrate(tmp_path / "text")
    convert(folder, tmp_path / "plain.rkf", k=8)
    convert(folder, tmp_path / "suited.rkf", k=8, calibrate=calibrate)
    source = RotatedSource(open_source(folder))
    blocks = rotations(source.model.program)
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
            for weights in (suited.decode(name), transformed(plain.decode(name), blocks[name])):
                error = (weights - dense).astype(np.float64)
                costs.append(np.einsum("rc,cd,rd->", error, moment, error))
            ratios.append(costs[0] / costs[1])
        assert max(ratios) < 1
        assert np.mean(ratios) < 0.8


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("options", [{"k": 16}, {"k": 16, "compensate": False}, {"bpw": 6.0}])
def test_few_values_stay_exact(tmp_path: Path, options: dict[str, Any]) -> None:
    """Matrices with at most K distinct values are not rotated: they come back to the bit."""
    model = models.model_of("llama")
    with torch.no_grad():
        for layer in model.model.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.copy_(layer.weight.sign() * 0.125)
    folder = models.save(model, tmp_path / "model")
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    convert(folder, tmp_path / "m.rkf", calibrate=Calibrate(tmp_path / "text"), **options)
    source = open_source(folder)
    with rkf.open(tmp_path / "m.rkf") as container:
        for name in source.tensors:
            if name.endswith("_proj.weight"):
                assert np.array_equal(container.decode(name), source.read(name).decode()), name


@pytest.mark.usefixtures("short")
def test_a_mixture(tmp_path: Path) -> None:
    """Its stacks hold experts, or a matrix for each head."""
    folder, calibrate = models.save(models.model_of("deepseek_v3"), tmp_path / "model"), Calibrate()
    predicted = convert(folder, tmp_path / "suited.rkf", k=8, calibrate=calibrate, dry_run=True)
    assert convert(folder, tmp_path / "suited.rkf", k=8, calibrate=calibrate).file_bytes == predicted.file_bytes
    convert(folder, tmp_path / "plain.rkf", k=8)
    source = RotatedSource(open_source(folder))
    blocks = rotations(source.model.program)
    ratios = []
    with rkf.open(tmp_path / "plain.rkf") as plain, rkf.open(tmp_path / "suited.rkf") as suited:
        for moments in calibrate(source).moments():
            for name, found in moments.items():
                if not isinstance(found, np.ndarray):
                    assert suited.load(name).rows_per_table == source.tensors[name].shape[1]
                    before = transformed(plain.decode(name), blocks.get(name, 1))
                    ratios += _ratios(source.read(name).decode(), suited.decode(name), before, found)
        assert suited.load("model.layers.1.mlp.gate.weight").dtype == "f32"  # the router
    assert len(ratios) > 8
    assert np.mean(ratios) < 0.8


@pytest.mark.usefixtures("short")
def test_a_budget_of_a_mixture(tmp_path: Path) -> None:
    folder = models.save(models.model_of("qwen3_moe"), tmp_path / "model")
    ledger = convert(folder, tmp_path / "out.rkf", bpw=8, calibrate=Calibrate())
    assert 6 < ledger.clustered_bits_per_weight <= 8


def _ratios(dense: Any, suited: Any, plain: Any, moments: Any) -> list[float]:
    """By expert, the squared error of its outputs relative to clustering without data."""
    found = []
    for expert in np.flatnonzero(moments.counts):
        errors = [np.asarray(each[expert] - dense[expert], np.float64) for each in (suited, plain)]
        costs = [np.einsum("rc,cd,rd->", error, moments.of(expert), error) for error in errors]
        found.append(costs[0] / costs[1])
    return found


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
def test_a_budget_is_spent_by_what_was_measured(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder("llama")
    whole = convert(folder, tmp_path / "out.rkf", k=32, dry_run=True).file_bytes
    losses = Calibrate()(open_source(folder)).losses(allocation.coarse)
    ledger = convert(folder, tmp_path / "out.rkf", size=whole, calibrate=Calibrate())
    chosen = {row.name: (int(row.stored_as[2:]), row.weights) for row in ledger.rows if row.stored_as.startswith("K=")}
    assert losses.keys() == chosen.keys()
    alike = [name for name, (_, weights) in chosen.items() if weights == chosen[min(chosen)][1]]
    assert len({chosen[name] for name in chosen}) > 2
    by_loss = [chosen[name][0] for name in sorted(alike, key=losses.__getitem__)]
    assert by_loss == sorted(by_loss)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("tied", [True, False])
def test_the_rows_of_frequent_tokens_are_exact(hf_folder: Callable[..., Path], tmp_path: Path, tied: bool) -> None:
    folder, out = hf_folder("llama", tie_word_embeddings=tied), tmp_path / "out.rkf"
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    calibrate = Calibrate(tmp_path / "text")
    convert(folder, out, k=8, calibrate=calibrate)
    source = RotatedSource(open_source(folder))
    frequent = calibrate(source).frequent
    counts = np.bincount(calibrate(source).tokens.reshape(-1))
    assert counts[frequent[0]] == counts.max()
    kept = frequent[: source.model.vocab_size // 16]
    with rkf.open(out) as file:
        for name in source.tensors:
            if len(source.tensors[name].shape) == 2 and len(source.read(name).decode()) == source.model.vocab_size:
                same = (file.decode(name) == source.read(name).decode()).all(axis=1)
                assert np.flatnonzero(same).tolist() == sorted(kept)


@pytest.mark.usefixtures("short")
def test_a_dry_run_knows_the_size(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = hf_folder("llama"), tmp_path / "out.rkf"
    predicted = convert(folder, out, k=8, calibrate=Calibrate(), dry_run=True)
    assert convert(folder, out, k=8, calibrate=Calibrate()).file_bytes == predicted.file_bytes


@pytest.mark.usefixtures("short")
def test_wide_matrices_want_more_text(
    hf_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = hf_folder("llama"), tmp_path / "out.rkf"
    source = open_source(folder)
    widest = max(spec.shape[-1] for spec in source.tensors.values())
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    calibrate = Calibrate(tmp_path / "text")
    assert len(calibrate(source).tokens) == 32
    assert not calibrate(source).notes
    monkeypatch.setattr("rkf.calibrate.calibration._PER_COLUMN", 960 // widest)
    assert len(calibrate(source).tokens) == 960 // widest * widest // 24
    predicted = convert(folder, out, k=8, calibrate=calibrate, dry_run=True)
    assert convert(folder, out, k=8, calibrate=calibrate).file_bytes == predicted.file_bytes
    monkeypatch.setattr("rkf.calibrate.calibration._MOST", 33 * 24)
    assert len(calibrate(source).tokens) == 33
    (tmp_path / "text").write_text(TEXT[:600], encoding="utf-8")
    for _ in range(2):  # made, and kept
        (note,) = Calibrate(tmp_path / "text", store=tmp_path / "kept")(source).notes
        assert re.search(r"text: \d+ tokens; more .* up to 792, makes", note)


@pytest.mark.usefixtures("short")
def test_kept_tokens_are_the_same_calibration(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder("llama")
    source = open_source(folder)
    made = Calibrate()(source)
    save(tmp_path / "tokens", made.kept(losses := made.losses(allocation.coarse)))
    kept = Calibrate(tmp_path / "tokens")(source)
    assert kept.losses(allocation.coarse) == losses and not kept.notes
    np.testing.assert_array_equal(kept.tokens, made.tokens)
    assert kept.provenance["tokens_blake3"] == made.provenance["tokens_blake3"]
    tokenizer = Tokenizer(source.tokenizer_json, source.model, source.chat_template)
    given, written = np.split(made.tokens, [96])
    texts = "\n".join(path.read_text("utf-8") for path in sorted(SHORT.parent.glob("*.txt")))
    ids = tokenizer.encode(texts, bos=False)
    ends = [ids[start + 1 : start + 24] for start in range(0, len(ids), 24)]
    assert all(piece.tolist()[1:] in ends for piece in given)
    assert (given[::2, 0] == 1).all() and (given[1::2, 0] != 1).all()
    begun, _ = prompts(source.model, tokenizer)
    assert len(written) == len(begun)
    for number, (found, prompt) in enumerate(zip(written, begun, strict=True)):
        lost = number % 2 * 4
        assert found[: max(len(prompt) - lost, 0)].tolist() == prompt[lost : lost + 24]


def test_a_short_context_takes_more_sequences_of_a_file(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT * 40, encoding="utf-8")
    calibrate = Calibrate(tmp_path / "text")
    source = open_source(hf_folder("llama", max_position_embeddings=64))
    assert calibrate(source).tokens.shape == (256, 64)
    assert calibrate.announced(source)["sequences"] == 256 and calibrate.announced(source)["ctx"] == 64


def test_a_context_shorter_than_the_text(hf_folder: Callable[..., Path]) -> None:
    made = Calibrate()(open_source(hf_folder("llama", max_position_embeddings=16)))
    assert made.tokens.shape == (128, 13)


@pytest.mark.usefixtures("short")
def test_a_second_size_measures_nothing(
    hf_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    folder, calibrations = hf_folder("llama"), tmp_path / "kept"
    for text in (None, tmp_path / "text"):
        calibrate = Calibrate(text, store=calibrations)
        convert(folder, tmp_path / "first.rkf", bpw=4.5, calibrate=calibrate, force=True)
        convert(folder, tmp_path / "second.rkf", bpw=5, calibrate=Calibrate(text), force=True)
        with monkeypatch.context() as patched:
            patched.setattr("rkf.calibrate.calibration.self_written", None)
            patched.setattr("rkf.calibrate.sensitivity.losses", None)
            convert(folder, tmp_path / "again.rkf", bpw=5, calibrate=calibrate, force=True)
        assert (tmp_path / "again.rkf").read_bytes() == (tmp_path / "second.rkf").read_bytes()
    assert len(list(calibrations.iterdir())) == 2


@pytest.mark.usefixtures("short")
def test_what_is_kept_is_checked(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    source, calibrate = open_source(hf_folder("llama")), Calibrate(store=tmp_path / "kept")
    tokens = calibrate(source).tokens
    (path,) = (tmp_path / "kept").iterdir()
    data = path.read_bytes()
    at = data.index(tokens.tobytes())
    for damaged in (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], data[:100], b""):
        path.write_bytes(damaged)
        np.testing.assert_array_equal(calibrate(source).tokens, tokens)
        assert path.read_bytes() == data
    (tmp_path / "file").write_bytes(b"")
    unkept = Calibrate(store=tmp_path / "file")(source)
    np.testing.assert_array_equal(unkept.tokens, tokens)


@pytest.mark.usefixtures("short")
def test_other_texts_of_rkf_are_not_those_that_were_kept(
    hf_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, calibrate = open_source(hf_folder("llama")), Calibrate(store=tmp_path / "kept")
    before = calibrate(source).tokens
    (tmp_path / "varied.txt").write_text("Another text. " * 999, encoding="utf-8")
    monkeypatch.setattr("rkf.calibrate.calibration._VARIED", tmp_path / "varied.txt")
    assert not np.array_equal(calibrate(source).tokens, before)
    assert len(list((tmp_path / "kept").iterdir())) == 2


def kept(tokens: np.ndarray | None = None, losses: dict[str, float] | None = None) -> bytes:
    """The bytes that `save` writes."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kept"
        tokens = np.zeros((2, 3), np.uint32) if tokens is None else tokens
        save(path, KeptCalibration(tokens, losses or {}, "0" * 64, "0" * 64))
        return path.read_bytes()


def _of_another_dtype() -> bytes:
    texts = np.array([], np.str_)
    arrays = {"tokens": np.zeros((2, 3), np.int64), "names": texts, "losses": np.zeros(0), "source": texts}
    return bytes(packed_arrays(KIND, arrays))


def _another_zip() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("text.txt", "a text")
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "expected UTF-8"),
        (b"short", "expected at least 512"),
        (b"PK\3\4 and so on", "not a calibration"),
        (_of_another_dtype(), "expected u4 with 2 axes"),
        (_another_zip(), "another zip"),
        (kept(), "another model"),
        (kept(tokens=np.zeros((2, 0), np.uint32)), "damaged"),
        (kept(tokens=np.full((2, 3), 1 << 30, np.uint32)), "another model"),
        (kept(losses={"model.layers.99.mlp.up_proj.weight": 1.0}), "another model"),
        (kept()[:-40], "not a calibration"),
        (kept().replace(b"\0" * 24, b"\0" * 23 + b"\1"), "not a calibration"),
    ],
)
def test_texts_that_are_none(hf_folder: Callable[..., Path], tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        Calibrate(tmp_path / "text")(open_source(hf_folder("llama", max_position_embeddings=512)))


@pytest.mark.usefixtures("short")
def test_a_calibration_of_other_weights_is_noted(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    made = Calibrate()(open_source(hf_folder("llama")))
    save(tmp_path / "tokens", replace(made.kept({}), weights="0" * 64))
    (note,) = Calibrate(tmp_path / "tokens")(made.source).notes
    assert "other weights" in note
    save(tmp_path / "tokens", replace(made.kept({}), tokenizer="0" * 64), force=True)
    with pytest.raises(UsageError, match="another model"):
        Calibrate(tmp_path / "tokens")(made.source)


def test_losses_of_a_model_with_fewer_layers_are_refused(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = open_source(hf_folder("llama"))
    names = [name for name, spec in source.tensors.items() if len(spec.shape) > 1 and "layers.1." not in name]
    (tmp_path / "text").write_bytes(kept(losses=dict.fromkeys(names, 1.0)))
    with pytest.raises(UsageError, match="another model"):
        Calibrate(tmp_path / "text")(source)


def test_an_output_that_exists_is_refused_before_the_work(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "short").write_text("too short to calibrate with")
    folder, out = hf_folder("llama"), tmp_path / "out"
    out.write_bytes(b"here already")
    for command in (
        ["convert", "--calibrate", str(tmp_path / "short")],
        ["calibrate", "--text", str(tmp_path / "short")],
    ):
        result = CliRunner().invoke(cli, [*command, str(folder), str(out)])
        assert "exists already" in result.output
    assert out.read_bytes() == b"here already"


@pytest.mark.usefixtures("short")
def test_a_system_without_affinity(
    hf_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    monkeypatch.delattr("os.sched_getaffinity")
    codec.workers.cache_clear()
    convert(hf_folder("llama"), tmp_path / "out.rkf", k=8, calibrate=Calibrate(tmp_path / "text"))
    assert codec.workers() == os.cpu_count()
    codec.workers.cache_clear()


def test_the_commands(hf_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _shorten(monkeypatch)
    monkeypatch.setenv("RKF_CACHE", str(tmp_path / "cache"))
    folder, tokens = str(hf_folder("llama")), str(tmp_path / "tokens")
    for arguments in (
        ["calibrate", folder, tokens],
        ["convert", folder, str(tmp_path / "a.rkf"), "--calibrate", tokens],
        ["convert", folder, str(tmp_path / "b.rkf")],
    ):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
    result = CliRunner().invoke(cli, ["convert", folder, str(tmp_path / "c.rkf"), "--calibrate", "wiki"])
    assert result.exit_code == 2
    assert "no such file" in result.output
    with rkf.open(tmp_path / "a.rkf") as a, rkf.open(tmp_path / "b.rkf") as b:
        assert a.ranks_id == b.ranks_id
