"""Options that several verbs share. They set how a model is loaded; `rkf.load` has the same keywords."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click


class _FiniteRange(click.FloatRange):
    """A float in a range; NaN and infinity, which pass any comparison or none, are in no range."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


POSITIVE = _FiniteRange(0, min_open=True)
NOT_NEGATIVE = _FiniteRange(0)
VALUES = click.option(
    "--values", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A .rkv file to use with MODEL."
)
THREADS = click.option("--threads", type=click.IntRange(1), help="Default: one per core.")
KV_CACHE = click.option(
    "--kv-cache",
    type=click.Choice(["f16", "int8", "f32"]),
    help="Number format of the key/value cache; default f16. int8 takes half the memory.",
)
BITS = click.option(
    "--bits",
    type=click.IntRange(1, 8),
    help="Run a coarser, faster model: read only the rank planes that fit into this many bits per weight.",
)
