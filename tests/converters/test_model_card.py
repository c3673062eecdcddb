"""Figures for a model card: only numbers, only from the output of `rkf eval … --json`."""

from pathlib import Path

import pytest

from rkf.converters.model_card import figures
from rkf.errors import UsageError


def test_figures_are_finite_numbers(tmp_path: Path) -> None:
    path = tmp_path / "ppl.json"
    path.write_text('{"ppl": 12.5, "kld": NaN, "accuracy": true, "top1": Infinity, "tokens": 7, "other": 1}')
    assert figures(path) == {"ppl": 12.5, "tokens": 7}


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", '{"a": 1}', ""])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ppl.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"rkf eval … --json"):
        figures(path)
