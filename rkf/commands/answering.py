"""What `rkf run` and `rkf chat` share: their options, the model that answers, and what they say about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rkf.commands.default_model import model_path
from rkf.commands.options import ADAPTER, BITS, DRAFT, KV_CACHE, THREADS, VALUES, answer_options
from rkf.file.atomic import refuse_existing

if TYPE_CHECKING:
    from rkf.runtime.generate import Generation
    from rkf.runtime.model import Model

Command = TypeVar("Command", bound=Callable[..., Any])
_LOADING = ("draft", "values", "adapter", "device", "threads", "kv_cache", "bits", "tensor_parallel")
MODEL = click.argument("model", required=False, type=click.Path(path_type=Path))
_SYSTEM = click.option("--system", metavar="TEXT", help="A system message.")
_SESSION = click.option(
    "--session",
    "session_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep keys and values in this file, so that the next run computes only what is new.",
)
_DEVICE = click.option(
    "--device",
    type=click.Choice(["cpu", "cpu-torch", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where to run; cpu-torch and cuda need torch.",
)


def answering_options(command: Command) -> Command:
    """--system, the options of answers, and those that `load_model` takes."""
    of_model = (DRAFT, BITS, KV_CACHE, THREADS, _DEVICE, ADAPTER, VALUES)
    for option in (_SESSION, *of_model, answer_options(max_tokens=256), _SYSTEM):
        command = option(command)
    return command


def loading_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of loading, taken out of a command's options."""
    return {name: options.pop(name) for name in _LOADING if name in options}


def load_model(model: Path | None, draft: Path | None, **options: Any) -> Model:
    """The model of a command. options: those of loading."""
    from rkf.runtime.model import load

    return load(model_path(model), draft=None if draft is None else model_path(draft), **options)


@contextmanager
def session(model: Model, path: Path | None) -> Iterator[None]:
    """Begin with the text in a session file, and leave the last one there, also after Ctrl-C."""
    if path is None:
        yield
        return
    refuse_existing(path, force=True)  # a folder; noticed before the work
    kept = model.session(path)
    kept.load()
    try:
        yield
    finally:
        kept.save()


def say_recommended(model: Model, given: dict[str, Any]) -> None:
    """Say which recommended options apply that nobody typed."""
    from rkf.runtime.recommended import recommended

    applied = {name: value for name, value in recommended(model.config).items() if name not in given}
    if applied:
        named = ", ".join(f"{name} {value:g}" for name, value in applied.items())
        click.echo(
            f"(the model's recommended sampling: {named}; --temperature 0 gives the same text each time)", err=True
        )


def say_if_cut(generation: Generation) -> None:
    """Say why an answer ended before its end."""
    if generation.stats.finish == "length":
        full = generation.stats.tokens != generation.limits.max_tokens
        why = "the context is full" if full else "--max-tokens allows more"
        click.echo(f"(cut at {generation.stats.tokens} tokens; {why})", err=True)
