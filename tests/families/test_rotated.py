"""Calibrated files are rotated: their logits, scales of their inputs, and the export that turns their weights back."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from rkf.calibrate.calibration import SHORT, Calibrate, Calibration
from rkf.cli import cli
from rkf.converters.export import export_hf
from rkf.converters.input_scales import InputScales
from rkf.converters.pipeline import convert
from rkf.converters.rotated_source import RotatedSource
from rkf.converters.source import Source, open_source
from rkf.errors import UsageError
from rkf.file.container import open_file
from rkf.model.rotation import rotations
from rkf.torch import load_into
from tests.calibrate.test_interpreter import run as interpreted
from tests.spec.reference import run

from .models import loaded, logits_of, model_of, save, tokens
from .test_logits import assert_close

SHORT_TEXT = np.random.default_rng(0).integers(3, 60, (3, 24)).astype(np.uint32)


@pytest.mark.parametrize(("variant", "scaled"), [("llama-biases", 22), ("gemma3", 21), ("qwen3_moe", 13), ("olmo2", 7)])
def test_scaled_inputs_are_the_same_model(tmp_path: Path, variant: str, scaled: int) -> None:
    """All matrices, but for a tied head, the gates of a mixture, and inputs that no norm has just made."""
    source = open_source(save(model_of(variant), tmp_path / "model"))
    squares = {}
    for found in Calibration(source, SHORT_TEXT, "").moments():
        squares |= {name: np.diagonal(each) for name, each in found.items() if isinstance(each, np.ndarray)}
    changed = RotatedSource(source, squares)
    assert len(InputScales.of(changed.model.program, source.aliases, squares).columns) == scaled
    before, after = (interpreted(each.model.program, weights_of(each), SHORT_TEXT) for each in (source, changed))
    assert np.abs(after - before).max() <= 2e-5 * np.abs(before).max()


def weights_of(source: Source) -> dict[str, np.ndarray]:
    names = [*source.tensors, *source.aliases]
    return {name: source.read(source.aliases.get(name, name)).decode() for name in names}


def test_a_quick_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkf.calibrate.calibration.CTX", 16)
    folder, out = save(model_of("llama"), tmp_path / "model"), tmp_path / "m.rkf"
    done = CliRunner().invoke(cli, ["convert", str(folder), str(out), "--k", "16", "--calibrate", "quick"])
    assert done.exit_code == 0, done.output
    planned = convert(folder, out, k=16, calibrate=Calibrate(SHORT), compensate=False, dry_run=True)
    assert planned.file_bytes == out.stat().st_size
    export_hf(out, tmp_path / "back")
    assert_close(run(out, tokens()), logits_of(loaded(tmp_path / "back")))
    with pytest.raises(UsageError, match="rotates nothing"):
        convert(folder, out, recipe="dense", calibrate=Calibrate(SHORT), compensate=False, force=True)


@pytest.mark.parametrize("variant", ["llama", "gemma3", "qwen3_moe"])
def test_a_calibrated_file_and_its_export(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkf.calibrate.calibration.WRITTEN", 4)
    monkeypatch.setattr("rkf.calibrate.calibration.WRITTEN_CTX", 16)
    folder = save(model_of(variant), tmp_path / "model")
    convert(folder, tmp_path / "m.rkf", k=16, calibrate=Calibrate())
    with open_file(tmp_path / "m.rkf") as file:
        assert file.model is not None
        blocks = rotations(file.model.program)
        clustered = [name for name, entry in file.tensors.items() if entry.kind == "clustered"]
        assert sum(name in blocks for name in clustered) > len(clustered) // 2
    export_hf(tmp_path / "m.rkf", tmp_path / "back")
    expected = logits_of(loaded(tmp_path / "back"))
    assert_close(run(tmp_path / "m.rkf", tokens()), expected)
    if variant == "llama":  # which has the file's names
        assert_close(logits_of(load_into(loaded(folder), tmp_path / "m.rkf")), expected)
