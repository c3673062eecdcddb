"""`study`: runs a named study of one model, from its files to results and report. Joins subject, trials and records."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import exp
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from blake3 import blake3

from rkf.errors import UsageError
from rkf.eval import reference as stored
from rkf.eval.divergence import sampled, windows_of
from rkf.eval.reference import Window
from rkf.file.container import open_file
from rkf.file.fingerprint import fingerprint
from rkf.runtime.model import load
from rkf.study import drift, interpolate, preserve, report, scramble
from rkf.study.records import Records
from rkf.study.subject import Probe, Subject, Trial, chosen_layers

STUDIES: dict[str, ModuleType] = {
    "scramble": scramble,
    "preserve": preserve,
    "drift": drift,
    "interpolate": interpolate,
}
Progress = Callable[[str, int, int], None]  # the trial, trials done, trials in all
_PREDICTIONS = "reference.kld"


def study(
    name: str,
    model: str | PathLike[str],
    out: str | PathLike[str],
    *,
    text: str,
    reference: str | PathLike[str] | None = None,
    seeds: int = 3,
    layers: Iterable[int] | None = None,
    windows: int = 8,
    ctx: int = 512,
    threads: int | None = None,
    progress: Progress = lambda trial, done, total: None,
) -> list[dict[str, Any]]:
    """Run the trials of a study that the folder `out` lacks, and write results and report. Returns the rows of all.

    name: one of STUDIES. model: a clustered rkf file. reference: the model from which divergence is measured (default:
    the model with its own values). text: its first `windows` windows of `ctx` tokens are measured as in `rkf.eval`.
    seeds: repeats of each random change (once for changes whose effect is far beyond its spread); more seeds extend a
    study. layers: those to change (default: all).

    `out` gets results.json, results.csv, values/*.rkv (for `rkf run MODEL --values`), report.md, report.html, figures.
    Raises UsageError: an unknown study, no such layers, a reference of another shape, a text that is too short,
    results of other inputs in `out`.
    """
    if name not in STUDIES:
        raise UsageError(f"study: expected one of {', '.join(STUDIES)}, got {name!r}")
    out, kind = Path(out), STUDIES[name]
    with open_file(model) as container, open_file(reference or model) as source:
        if container.model is None or source.model is None or not container.model.computes_as(source.model):
            raise UsageError(f"{source.path}: expected a whole model of the same dimensions as {container.path}")
        options = {"study": name, "windows": windows, "ctx": ctx, "layers": chosen_layers(container, layers)}
        about: dict[str, Any] = {
            **options,
            "model": container.path.name,
            "reference": source.path.name if reference else "the model itself",
            "fingerprint": fingerprint(
                [container, source], [options, bool(reference), blake3(text.encode()).hexdigest()]
            ),
        }
        about["command"] = (
            f"rkf study {name} {container.path.name} OUT --text TEXT --windows {windows} --ctx {ctx} --seeds {seeds}"
            + (f" --reference {source.path.name}" if reference else "")
            + (f" --layers {','.join(map(str, about['layers']))}" if layers is not None else "")
        )
        records = Records(out, about)
        exact = reference is not None
        found = predictions(records, lambda: source.path, text, ctx, windows, exact=exact, threads=threads)
        records.about["ppl"] = exp(-np.mean(np.concatenate([window.target for window in found])))
        subject = Subject(container, out / "values", about["layers"], Probe(found, threads))
        if reference and "unchanged" not in records.about:
            records.about["unchanged"] = subject.probe(container.path)
        do(records, kind.trials(subject, seeds), progress)
    report.write(out, f"Study: {name}", kind.ABOUT, records.about, kind.charts(records.rows))
    return records.rows


def do(records: Records, trials: Iterable[Trial], progress: Progress) -> None:
    """Run the trials that have no record yet and are not pointless."""
    planned = list(trials)
    for done, trial in enumerate(planned):
        progress(trial.name, done, len(planned))
        if records.find(trial) is None and not trial.pointless(records.rows):
            records.add(trial)
    progress("report", len(planned), len(planned))


def predictions(
    records: Records, model: Callable[[], Path], text: str, ctx: int, windows: int, *, exact: bool, threads: int | None
) -> list[Window]:
    """The reference's predictions on the text, cached in the study's folder. model: returns its path if it must run."""
    path = records.own(_PREDICTIONS)
    if not path.exists():
        with load(model(), exact=exact, threads=threads) as ready:
            made = windows_of(ready, text, ctx=ctx, windows=windows)
            stored.write(path, [sampled(window, number) for number, window in enumerate(made)])
    return stored.read(path)
