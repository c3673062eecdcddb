"""The model that `rkf run` uses when none is named: fetched and converted once, then found in the cache."""

from __future__ import annotations

from pathlib import Path

import click

from rkf._version import __version__
from rkf.cache import cache_dir

NAME = "smollm2-135m-instruct"


def default_model() -> Path:
    """The converted default model; stderr reports the fetch and the conversion."""
    path = cache_dir() / "models" / f"{NAME}-{__version__}.rkf"
    if not path.exists():
        _make(path)
    return path


def _make(path: Path) -> None:
    from rkf.converters.pipeline import convert
    from rkf.converters.pull import pull

    click.echo(f"rkf: fetching {NAME}, once", err=True)
    source = pull(NAME)
    click.echo(f"rkf: converting it to {path}, once", err=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    convert(source, path)


if __name__ == "__main__":
    click.echo(default_model())
