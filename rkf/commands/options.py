"""Options that several verbs share: how a model is loaded (as `rkf.load`), how it answers (as `Model.stream`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rkf.commands.quantities import NOT_NEGATIVE, POSITIVE, THREAD_COUNT, Finite, Integer
from rkf.errors import UsageError, naming
from rkf.text.reading import read_text

if TYPE_CHECKING:
    from rkf.runtime.guide import Form

Command = TypeVar("Command", bound=Callable[..., Any])


VALUES = click.option(
    "--values", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A .rkv file to use with MODEL."
)
ADAPTER = click.option(
    "--adapter",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The folder of a PEFT LoRA adapter to apply to MODEL while it runs.",
)
THREADS = click.option("--threads", type=THREAD_COUNT, help="Default: one per core.")
KV_CACHE = click.option(
    "--kv-cache",
    type=click.Choice(["int16", "int16-int8", "int8", "f32"]),
    help="Number format of the key/value cache; default int16. int16-int8 shortens the values and takes three quarters "
    "of the memory; int8 takes half, with a larger error.",
)
BITS = click.option(
    "--bits",
    type=Integer(1, 8),
    help="Run a coarser, faster model: read only the rank planes that fit into this many bits per weight.",
)
DRAFT = click.option(
    "--draft",
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="A smaller model with the same tokenizer, which guesses tokens ahead. It changes no text.",
)
_CONVERSATION = ("messages", "tools", "add_generation_prompt")  # variables of a template that rkf sets itself
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_ANSWERS = (
    click.option("--temperature", type=NOT_NEGATIVE, help="0 always takes the most likely token."),
    click.option("--top-k", type=Integer(1), help="Choose from this many most likely tokens."),
    click.option(
        "--top-p",
        type=Finite(0, 1, min_open=True),
        help="Choose from tokens that together have this probability.",
    ),
    click.option("--min-p", type=Finite(0, 1), help="Leave out tokens below this share of the most likely one."),
    click.option("--repetition-penalty", type=POSITIVE, help="Divide the logits of tokens that occurred; 1: none."),
    click.option("--presence-penalty", type=Finite(-2, 2), help="Subtract from the logits of tokens of the answer."),
    click.option("--frequency-penalty", type=Finite(-2, 2), help="The same, for each occurrence."),
    click.option("--seed", type=Integer(0, (1 << 64) - 1), help="Same seed, same text. Default: another each time."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text. Repeatable."),
    click.option("--json-schema", type=_FILE, help="Answer with JSON of this schema (needs the serve extra)."),
    click.option("--grammar", type=_FILE, help="Answer by this grammar in Lark's syntax (needs the serve extra)."),
    click.option(
        "--template-arg", multiple=True, metavar="KEY=VALUE", help="A variable of the chat template, as JSON or text."
    ),
)


def answer_options(max_tokens: int | None) -> Callable[[Command], Command]:
    """The options that `answer_keywords` reads. max_tokens: the default of --max-tokens; None: as many as fit."""
    shown = "the context's end" if max_tokens is None else True
    most = click.option(
        "--max-tokens",
        type=Integer(0),
        default=max_tokens,
        show_default=shown,
        help="Maximum tokens of an answer.",
    )

    def decorate(command: Command) -> Command:
        for option in reversed((most, *_ANSWERS)):
            command = option(command)
        return command

    return decorate


def answer_keywords(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `answer_options` that were given, as keywords of `Model.stream`."""
    kept = {key: value for key, value in options.items() if value is not None}
    if "" in kept.get("stop", ()):
        raise UsageError("--stop: expected a text that is not empty: an empty one would stop everything")
    form = _form(kept.pop("json_schema", None), kept.pop("grammar", None))
    arguments = dict(map(_template_arg, kept.pop("template_arg", ())))
    return kept | ({"form": form} if form else {}) | ({"template_args": arguments} if arguments else {})


def _form(json_schema: Path | None, grammar: Path | None) -> Form | None:
    from rkf.runtime.guide import Form, check

    if json_schema is not None and grammar is not None:
        raise UsageError("--json-schema and --grammar exclude each other: give one")
    path = json_schema or grammar
    if path is None:
        return None
    form = Form("grammar" if json_schema is None else "json_schema", read_text(path))
    with naming(path):
        check(form)
    return form


def _template_arg(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UsageError(f"--template-arg: expected KEY=VALUE, got {text!r}")
    if key in _CONVERSATION:
        raise UsageError(f"--template-arg: {key} comes from the conversation: choose another key")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value
