"""How much of the loss from clustering tuning recovers: the trials of docs/paper/*/tune. Knows no page.

A model is tuned towards the dense checkpoint on text that the checkpoint generates, then measured on another text. An
interrupted tuning resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rkf.file.container import open_file
from rkf.file.fingerprint import fingerprint
from rkf.study.charts import Row, only
from rkf.study.records import Records
from rkf.study.running import do, predictions
from rkf.study.subject import Probe, Trial

FORMS = {  # the model before tuning -> options of `rkf convert`
    "dense": ["--recipe", "dense"],
    "K = 16": ["--recipe", "paper-exceptions", "--k", "16", "--calibrate", "none"],
    "K = 32": ["--recipe", "paper-exceptions", "--k", "32", "--calibrate", "none"],
    "K = 16, calibrated": ["--k", "16"],
}


@dataclass(frozen=True)
class Plan:
    """minutes: the training time of each form, for centroids and a factor for every matrix, or for every row. windows,
    ctx: of the text that is measured.
    """

    minutes: Mapping[tuple[str, str], float]
    windows: int
    ctx: int = 512

    @property
    def trials(self) -> int:
        """Each form before tuning, and each tuning."""
        return len({name for name, _ in self.minutes}) + len(self.minutes)


PLANS = {  # of the models; minutes on one thread
    "SmolLM2-135M": Plan(
        {
            ("K = 16", "row"): 15,
            ("K = 16", "matrix"): 9,
            ("K = 32", "row"): 13,
            ("K = 32", "matrix"): 7,
            ("K = 16, calibrated", "matrix"): 5,
        },
        windows=64,
    ),
    "Qwen2.5-Coder-0.5B": Plan({("K = 16", "matrix"): 30}, windows=16),
}
Convert = Callable[[Path, Sequence[str]], None]


@dataclass(frozen=True)
class Models:
    """The folder of model files, each made on first use. convert: makes one from the checkpoint with given options."""

    folder: Path
    convert: Convert

    def __call__(self, name: str) -> Path:
        path = self.folder / f"{name}.rkf"
        if not path.exists():
            self.convert(path, FORMS[name])
        return path

    def tuned(self, name: str, factors: str, minutes: float, threads: int) -> Path:
        """The values file of a tuning."""
        import torch

        from rkf.tune import tune

        path = self.folder / f"{name}, {factors}.rkv"
        if not path.exists():
            torch.set_num_threads(threads)
            tune(self(name), self("dense"), path, minutes=minutes, rows=factors == "row", resume=True)
        return path


def tuning(out: Path, plan: Plan, text: str, threads: int, *, convert: Convert) -> None:
    """Run the trials of a plan that the folder `out` does not have yet."""
    models = Models(out, convert)
    with open_file(models("dense")) as dense:
        identity = fingerprint([dense], [plan.windows, plan.ctx, text])
        about = {"windows": plan.windows, "ctx": plan.ctx, "fingerprint": identity}
    records = Records(out, about)
    windows = predictions(records, lambda: models("dense"), text, plan.ctx, plan.windows, exact=True, threads=threads)
    do(records, _trials(models, plan, Probe(windows, threads)), lambda trial, done, total: None)


def recovered(rows: list[Row], row: Row) -> tuple[float, float]:
    """The recovered share of the perplexity above the dense model's, and of the divergence."""
    (before,) = only(rows, model=row["model"], factors=None)
    return (before["ppl_ratio"] - row["ppl_ratio"]) / (before["ppl_ratio"] - 1), 1 - row["kld"] / before["kld"]


def _trials(models: Models, plan: Plan, probe: Probe) -> Iterator[Trial]:
    for name in dict.fromkeys(name for name, _ in plan.minutes):
        yield Trial({"model": name, "factors": None}, partial(_untuned, models, probe, name))
    for (name, factors), minutes in plan.minutes.items():
        yield Trial({"model": name, "factors": factors}, partial(_tuned, models, probe, name, factors, minutes))


def _untuned(models: Models, probe: Probe, name: str) -> dict[str, Any]:
    return probe(models(name))


def _tuned(models: Models, probe: Probe, name: str, factors: str, minutes: float) -> dict[str, Any]:
    values = models.tuned(name, factors, minutes, probe.threads or 1)
    with open_file(values) as container:
        report = container.provenance["tuned"]
    kept = {key: report[key] for key in ("parameters", "steps")}
    return {"minutes": minutes, **kept, "own_text": report["recovered"], **probe(models(name), values)}
