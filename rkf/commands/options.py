"""Options that several verbs share. They set how a model is loaded; `rkf.load` has the same keywords."""

from __future__ import annotations

from pathlib import Path

import click

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
