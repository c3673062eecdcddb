"""`rkf study`: experiments that change a model's centroids on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rkf.commands.convert import calibration
from rkf.commands.output import print_json, progress_bar
from rkf.commands.quantities import THREAD_COUNT, Integer, Numbers
from rkf.errors import UsageError
from rkf.file.atomic import refuse_same_file
from rkf.text.reading import read_text
from rkf.text.terminal import printable

NAMES = ("sweep", "scramble", "preserve", "drift", "interpolate")


@click.command()
@click.argument("name", type=click.Choice(NAMES))
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--text", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="UTF-8 text to predict."
)
@click.option("--reference", type=click.Path(path_type=Path), help="Model to compare predictions with. Default: MODEL.")
@click.option("--seeds", type=Integer(1, 10_000), default=3, show_default=True, help="Repeats of a random change.")
@click.option("--layers", type=Numbers(0, 9999), metavar="0,4-7", help="Change only these layers. Default: all.")
@click.option("--windows", type=Integer(1), default=8, show_default=True, help="Windows of the text.")
@click.option(
    "--ctx", type=Integer(4), default=512, show_default=True, help="Tokens per window; its second half is scored."
)
@click.option(
    "--k", "ks", type=Numbers(2, 256), metavar="4,8,16", help="Only for sweep. Default: powers of two from 4 to 256."
)
@click.option("--calibrate", metavar="self|FILE", help="Only for sweep: also convert with calibration on this text.")
@click.option("--threads", type=THREAD_COUNT, help="Default: one per core.")
@click.option("--json", "as_json", is_flag=True, help="Print every trial as JSON.")
def study(
    name: str, model: str, out: Path, text: Path, layers: list[int] | None, as_json: bool, **options: Any
) -> None:
    """Change centroids on purpose and measure the effect on the model.

    NAME is scramble (other values for each rank, order broken), preserve (other values, order kept), drift (more and
    more layers changed) or interpolate (the straight path to changed values); MODEL is then an rkf file. Or NAME is
    sweep (every K, and which matrix collapses); MODEL is then a checkpoint. OUT is a folder for results.json,
    results.csv, report.md, report.html, figures, and the values file of every trial, for `rkf run MODEL --values`. An
    interrupted study resumes from OUT; a larger --seeds adds trials. Needs matplotlib.
    """
    from rkf.study.records import RESULTS, TABLE
    from rkf.study.report import PAGES

    for written in (RESULTS, TABLE, *PAGES):
        refuse_same_file(out / written, text)
    with progress_bar(name, "trial") as bar:

        def show(trial: str, done: int, total: int) -> None:
            bar.set_postfix_str(trial)
            bar.total = total
            bar.update(done - bar.n)

        common = {"text": read_text(text), "layers": layers, "progress": show, **options}
        rows = _sweep(model, out, **common) if name == "sweep" else _change(name, model, out, **common)
    if as_json:
        print_json(rows)
    else:
        click.echo(f"{printable(out / 'report.html')}: {len(rows)} trials", err=True)


def _change(name: str, model: str, out: Path, ks: list[int] | None, calibrate: str | None, **options: Any) -> list[Any]:
    from rkf.study import study as run

    if ks or calibrate:
        raise UsageError(f"study {name}: --k and --calibrate are options of sweep only")
    return run(name, model, out, **options)


def _sweep(
    src: str, out: Path, ks: list[int] | None, calibrate: str | None, reference: Path | None, seeds: int, **options: Any
) -> list[Any]:
    from rkf.calibrate.calibration import Calibrate
    from rkf.calibrate.devices import Cpu
    from rkf.calibrate.kept import save
    from rkf.converters.input_files import hash_file
    from rkf.converters.pipeline import convert
    from rkf.converters.pull import locate
    from rkf.converters.source import open_source
    from rkf.study import sweep

    if reference:
        raise UsageError("study sweep: its reference is the checkpoint: omit --reference")
    chosen = calibration(calibrate or "none", Cpu())
    text = None if chosen is None else "self" if chosen.text is None else hash_file(chosen.text)
    source = open_source(locate(src))

    def converted(out: Path, *, recipe: str, k: int | None, calibrated: bool) -> None:
        tokens = out.with_name("calibration.tok")
        if calibrated and chosen and not tokens.exists():  # one text for every K, generated once
            save(tokens, chosen(source).kept({}))
        convert(src, out, recipe=recipe, k=k, calibrate=Calibrate(tokens) if calibrated else None)

    return sweep(
        out,
        convert=converted,
        source=source.label,
        fingerprint=source.fingerprint,
        calibration=text,
        ks=ks,
        **options,
    )
