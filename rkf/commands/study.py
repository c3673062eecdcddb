"""`rkf study`: what a model becomes when its centroids are changed on purpose."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from rkf.commands.measure import read
from rkf.commands.output import print_json, printable, progress_bar
from rkf.errors import UsageError

NAMES = ("scramble", "preserve", "interpolate")


@click.command()
@click.argument("name", type=click.Choice(NAMES))
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--text", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="UTF-8 text to predict."
)
@click.option("--reference", type=click.Path(path_type=Path), help="Whose predictions count. Default: MODEL's own.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Repeats of a random change.")
@click.option("--layers", metavar="0,4-7", help="Change these layers only. Default: all.")
@click.option("--windows", type=click.IntRange(1), default=8, show_default=True, help="Windows of the text.")
@click.option("--ctx", type=int, default=512, show_default=True, help="Tokens a window; its second half is scored.")
@click.option("--threads", type=click.IntRange(1), help="Default: one a core.")
@click.option("--json", "as_json", is_flag=True, help="Print every trial as JSON.")
def study(name: str, model: Path, out: Path, text: Path, layers: str | None, as_json: bool, **options: Any) -> None:
    """Change centroids on purpose and measure what becomes of the model.

    NAME: scramble (values under other ranks), preserve (other values, ranks in order), interpolate (the straight path
    to changed values). MODEL: an rkf file. OUT: a folder for results.json, results.csv, report.md, report.html,
    figures, and the values file of every trial, for `rkf run MODEL --values`. A study that was interrupted goes on
    from what OUT holds; more seeds extend it. Needs matplotlib.
    """
    from rkf.study import study as run

    with progress_bar(name, "trial") as bar:

        def show(trial: str, done: int, total: int) -> None:
            bar.set_postfix_str(trial)
            bar.total = total
            bar.update(done - bar.n)

        rows = run(name, model, out, text=read(text), layers=numbers(layers), progress=show, **options)
    if as_json:
        print_json(rows)
    else:
        click.echo(f"{printable(out / 'report.html')}: {len(rows)} trials", err=True)


def numbers(text: str | None) -> list[int] | None:
    """Numbers and ranges of them, "0,4-7"; UsageError for anything else."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise UsageError(f"layers: expected numbers and ranges such as 0,4-7, got {text!r}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found
