"""`rkf tune`: tunes the values of a model for its ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from rkf.commands.output import print_json, progress_bar
from rkf.commands.quantities import MINUTES
from rkf.text.terminal import printable


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--reference", required=True, type=click.Path(path_type=Path), help="The model before clustering: a dense rkf file."
)
@click.option("--data", default="self", show_default=True, metavar="self|FILE", help="Training text, UTF-8.")
@click.option("--minutes", type=MINUTES, default=30.0, show_default=True, help="To train.")
@click.option("--rows", is_flag=True, help="Train factors a and b for every row, not one a for every matrix.")
@click.option("--resume", is_flag=True, help="Resume the same tuning after an interruption.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tune(model: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Tune centroids and affine factors; the ranks stay unchanged.

    MODEL: an rkf file. OUT: the values file (.rkv) to write, for `rkf run MODEL --values OUT`. Trains towards the
    reference's predictions on text that the reference generates itself (--data self) or on FILE. Needs torch.
    """
    from rkf.tune import tune as learn

    with progress_bar("tune", "") as bar:
        report = learn(model, out=out, progress=showing(bar), **options)
    if as_json:
        print_json(report)
    else:
        click.echo(summary(out, report), err=True)


def showing(bar: Any) -> Callable[[str, int, int], None]:
    """A callback that shows the progress of `rkf.tune.tune` on a bar."""

    def show(what: str, done: int, total: int) -> None:
        bar.set_description(what)
        bar.total, bar.n = total, done
        bar.refresh()

    return show


def summary(out: Path, report: Mapping[str, Any]) -> str:
    """The result of a tuning in one line."""
    return (
        f"{printable(out)}: kld {report['kld_before']:.4f} -> {report['kld']:.4f} on held-out text "
        f"({report['recovered']:.0%} recovered) in {report['steps']} steps"
    )
