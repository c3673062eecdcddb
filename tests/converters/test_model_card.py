"""Figures for a model card: only numbers, only from the output of `rkf eval … --json`."""

from pathlib import Path

import pytest

from rkf.converters.hub import HubName
from rkf.converters.model_card import figures, model_card
from rkf.errors import UsageError
from rkf.file.edit import edit
from tests.fuzz import seeds


def test_figures_are_finite_numbers(tmp_path: Path) -> None:
    path = tmp_path / "ppl.json"
    path.write_text('{"ppl": 12.5, "kld": NaN, "accuracy": true, "top1": Infinity, "tokens": 7, "other": 1}')
    assert figures(path) == {"ppl": 12.5, "tokens": 7}


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", '{"a": 1}', "", '{"kld": NaN}', '{"ppl": "1"}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ppl.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"rkf eval … --json"):
        figures(path)


def test_a_dense_file_has_a_card() -> None:
    card = model_card(seeds.rkf_file(), HubName("user/model"), licence="apache-2.0")
    assert "license: apache-2.0" in card and "| bits per weight |" in card and "clustered" not in card


@pytest.mark.parametrize("licence", ["", "a\nb: c", "a b"])
def test_a_licence_is_one_word(licence: str) -> None:
    with pytest.raises(UsageError, match="--licence: expected the hub's identifier"):
        model_card(seeds.rkf_file(), HubName("user/model"), licence=licence)


def test_what_others_wrote_into_a_file_and_huge_numbers(tmp_path: Path) -> None:
    path = tmp_path / "m.rkf"
    path.write_bytes(seeds.rkf_file().read_bytes())
    edit(path, provenance={"source": "x", "recipe": "y"})
    assert "as ranks and values" in model_card(path, HubName("user/model"))
    (tmp_path / "ppl.json").write_text(f'{{"ppl": 1{"0" * 400}, "tokens": 7}}')
    assert figures(tmp_path / "ppl.json") == {"tokens": 7}
