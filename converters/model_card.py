"""The model card of a pushed file: README.md with the hub's front matter, from the file and measured figures alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, cast

from rkf.converters.hub import HubName
from rkf.errors import UsageError
from rkf.file.container import open_file
from rkf.file.footprint import footprint
from rkf.text.reading import read_text

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(@[0-9a-f]+)?")
_LICENCE = re.compile(r"[\w.+-]+")
# Keys of `rkf eval … --json` that a reader compares, in order.
_FIGURES = (
    "ppl",
    "ppl_stderr",
    "ppl_ratio",
    "kld",
    "kld_stderr",
    "top1",
    "accuracy",
    "accuracy_stderr",
    "tokens",
    "items",
)


def figures(path: Path) -> dict[str, Any]:
    """The figures of a file written by `rkf eval … --json`. Raises UsageError for any other file."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: expected the output of `rkf eval … --json`: {error}") from error
    if not isinstance(found, dict) or not any(key in found for key in _FIGURES):
        raise UsageError(f"{path}: expected the output of `rkf eval … --json`")
    kept = {key: found[key] for key in _FIGURES if _is_figure(found.get(key))}
    if not kept:
        raise UsageError(f"{path}: expected a figure of `rkf eval … --json` that is a finite number")
    return kept


def _is_figure(value: object) -> bool:
    try:
        return type(value) in (int, float) and isfinite(cast(float, value))
    except OverflowError:  # a whole number beyond all floats
        return False


def model_card(path: Path, name: HubName, *, licence: str | None = None, quality: Sequence[Path] = ()) -> str:
    """README.md for a model file. licence: its identifier on the hub. quality: files with measured figures."""
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise UsageError(f"--licence: expected the hub's identifier, such as apache-2.0, got {licence!r}")
    ledger = footprint(path)
    with open_file(path, check="structure") as file:
        provenance, model = file.provenance, file.model
    if model is None:
        raise UsageError(f"{path}: is not a model, so it has no card")
    file_name = name.file or path.name
    source = _told(provenance, "source", "label")
    base = _HUB_ID.fullmatch(source)
    front = {
        "library_name": "rkf",
        "pipeline_tag": "text-generation",
        **({"license": licence} if licence else {}),
        **({"base_model": base[1], "base_model_relation": "quantized"} if base else {}),
    }
    lines = ["---", *(f"{key}: {value}" for key, value in front.items()), "tags:", "- rkf", "---", ""]
    lines += [f"# {name.repo.rpartition('/')[2]}", "", f"`{file_name}`: {source or 'a model'} as ranks and values.", ""]
    lines += ["```sh", "pip install rkf-llm", f'rkf run {HubName(name.repo, file_name)} --prompt "Hello"', "```", ""]
    lines += _table("Size", _sizes(ledger))
    for each in quality:
        lines += _table(f"Measured: {each.stem}", {key: f"{value:g}" for key, value in figures(each).items()})
    lines += ["## Recipe", "", "```toml", _told(provenance, "recipe", "text").rstrip(), "```", ""]
    return "\n".join(lines)


def _told(provenance: Mapping[str, Any], what: str, key: str) -> str:
    """What a file tells of its source or recipe; "" if that is nothing, or in another form than rkf's."""
    found = provenance.get(what)
    return str(found.get(key, "")) if isinstance(found, Mapping) else ""


def _sizes(ledger: Mapping[str, Any]) -> dict[str, str]:
    found = {
        "file": f"{ledger['file_bytes'] / 1e6:.1f} MB",
        "weights": f"{ledger['weights']:,}",
        "bits per weight": f"{ledger['bits_per_weight']:.3f}",
    }
    clustered = ledger["clustered_bits_per_weight"]  # None where all is dense
    return found if clustered is None else {**found, "bits per clustered weight": f"{clustered:.3f}"}


def _table(title: str, rows: Mapping[str, str]) -> list[str]:
    return [f"## {title}", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
