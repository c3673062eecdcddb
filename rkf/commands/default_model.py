"""Which file a command runs: the one named, one on the hub, or the default model, fetched and converted once."""

from __future__ import annotations

from pathlib import Path

import click

from rkf._version import __version__
from rkf.cache import cache_dir
from rkf.errors import UsageError

NAME = "smollm2-135m-instruct"


def model_path(model: Path | None) -> Path:
    """The file to run. USER/REPO[:FILE] on the hub is fetched; an existing path wins; None is the default model.

    Raises UsageError for a checkpoint that is not converted, and the errors of `rkf.converters.pull.locate`.
    """
    if model is None:
        return default_model()
    if model.exists():
        return model
    from rkf.converters.pull import locate

    found = locate(str(model))
    if found.is_dir() or found.suffix == ".gguf":
        raise UsageError(f"{model}: is a checkpoint and no .rkf file: use `rkf convert {model} OUT` first")
    return found


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
