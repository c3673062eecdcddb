"""Calibrated files are rotated: their logits, and the export that turns their weights back."""

from pathlib import Path

import pytest

from rkf.calibrate.calibration import Calibrate
from rkf.converters.export import export_hf
from rkf.converters.pipeline import convert
from rkf.file.container import open_file
from rkf.model.rotation import rotations
from rkf.torch import load_into
from tests.spec.reference import run

from .models import loaded, logits_of, model_of, save, tokens
from .test_logits import assert_close


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
