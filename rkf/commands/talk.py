"""`rkf run` and `rkf chat`: generating text with a model."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from rkf.commands.default_model import model_path
from rkf.commands.options import BITS, DRAFT, KV_CACHE, THREADS, VALUES, answer_keywords, answer_options
from rkf.commands.output import write_text
from rkf.errors import ContextLengthError, UsageError
from rkf.text.reading import read_stream, read_text

if TYPE_CHECKING:
    from rkf.runtime.generate import Generation
    from rkf.runtime.model import Model

MODEL = click.argument("model", required=False, type=click.Path(path_type=Path))
SYSTEM = click.option("--system", metavar="TEXT", help="A system message.")
DEVICE = click.option(
    "--device",
    type=click.Choice(["cpu", "cpu-torch", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where to run; cpu-torch and cuda need torch.",
)


@click.command()
@MODEL
@click.option("--prompt", metavar="TEXT", help="The prompt to answer. Default, or with -: what stdin gives.")
@click.option(
    "--prompt-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A UTF-8 file with the prompt."
)
@SYSTEM
@answer_options(max_tokens=256)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@VALUES
@DEVICE
@THREADS
@KV_CACHE
@BITS
@DRAFT
@click.option("--stats", is_flag=True, help="Print times and rates to stderr.")
def run(
    model: Path | None,
    prompt: str | None,
    prompt_file: Path | None,
    values: Path | None,
    device: str,
    threads: int | None,
    kv_cache: str | None,
    bits: int | None,
    draft: Path | None,
    stats: bool,
    system: str | None,
    raw: bool,
    **options: Any,
) -> None:
    """Answer one prompt. Without MODEL: SmolLM2-135M-Instruct, fetched and converted once.

    Without sampling options those apply that the model's authors recommend; if there are none, temperature 0.
    """
    text, keywords = _prompt(prompt, prompt_file), answer_keywords(options)
    began = perf_counter()
    loading = {"values": values, "device": device, "threads": threads, "kv_cache": kv_cache, "bits": bits}
    with _load(model, draft, loading) as ready:
        loaded = perf_counter()
        _say_recommended(ready, keywords)
        generation = ready.stream(text, system=system, raw=raw, **keywords)
        for piece in generation:
            write_text(piece)
        click.echo()
        _say_if_cut(generation)
        if stats:
            click.echo(_stats(generation, loaded - began), err=True)


@click.command()
@MODEL
@SYSTEM
@answer_options(max_tokens=256)
@VALUES
@DEVICE
@THREADS
@KV_CACHE
@BITS
@DRAFT
def chat(
    model: Path | None,
    system: str | None,
    values: Path | None,
    device: str,
    threads: int | None,
    kv_cache: str | None,
    bits: int | None,
    draft: Path | None,
    **options: Any,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D quits. Without MODEL: SmolLM2-135M-Instruct."""
    keywords = answer_keywords(options)
    _edit_lines()
    loading = {"values": values, "device": device, "threads": threads, "kv_cache": kv_cache, "bits": bits}
    with _load(model, draft, loading) as ready:
        _say_recommended(ready, keywords)
        if "form" in keywords:
            ready.guides.guide(keywords["form"])  # refused now, not after the first line
        messages = [{"role": "system", "content": system}] if system is not None else []
        first = len(messages)
        while (line := _read_line()) is not None:
            if line.strip():
                try:
                    messages = _turn(ready, [*messages, {"role": "user", "content": line}], first, keywords)
                except ContextLengthError as error:  # of this line alone: the conversation goes on without it
                    click.echo(f"({error}; the line was ignored)", err=True)


def _load(model: Path | None, draft: Path | None, options: dict[str, Any]) -> Model:
    from rkf.runtime.model import load

    return load(model_path(model), draft=draft and model_path(draft), **options)


def _prompt(text: str | None, file: Path | None) -> str:
    """The prompt from an option, a file or stdin; a line break at the end of the latter two is not part of it."""
    if text is not None and file is not None:
        raise UsageError("--prompt and --prompt-file exclude each other: give one")
    if file is None and text is not None and text != "-":
        return text
    if file is not None:
        found = read_text(file)
    else:
        found = "" if text is None and sys.stdin.isatty() else read_stream(sys.stdin.buffer, "stdin")
    found = found.removesuffix("\n").removesuffix("\r")
    if not found:
        raise UsageError("no prompt: give --prompt TEXT or --prompt-file FILE, or pipe it in")
    return found


def _say_recommended(model: Model, given: dict[str, Any]) -> None:
    """Say which recommended options apply that nobody typed."""
    from rkf.runtime.recommended import recommended

    applied = {name: value for name, value in recommended(model.config).items() if name not in given}
    if applied:
        named = ", ".join(f"{name} {value:g}" for name, value in applied.items())
        click.echo(
            f"(the model's recommended sampling: {named}; --temperature 0 gives the same text each time)", err=True
        )


def _say_if_cut(generation: Generation) -> None:
    if generation.stats.finish == "length":
        full = generation.stats.tokens != generation.limits.max_tokens
        why = "the context is full" if full else "--max-tokens allows more"
        click.echo(f"(cut at {generation.stats.tokens} tokens; {why})", err=True)


def _stats(generation: Generation, load_s: float) -> str:
    stats = generation.stats
    steps = max(stats.tokens - 1, 0)  # the prompt's pass gives the first token
    prefill = stats.prompt_tokens / stats.prefill_s if stats.prefill_s else 0.0
    decode = steps / stats.decode_s if stats.decode_s else 0.0
    return (
        f"load {load_s:.2f} s, prompt {stats.prompt_tokens} tokens {stats.prefill_s:.2f} s ({prefill:.1f} tok/s), "
        f"answer {stats.tokens} tokens {stats.decode_s:.2f} s ({decode:.1f} tok/s), first token after "
        f"{load_s + stats.prefill_s:.2f} s"
    )


def _edit_lines() -> None:
    """Line editing and history in `input`, where the platform supports them. Bytes that are not UTF-8 spoil their line
    alone.
    """
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        import readline  # noqa: F401 - importing it is what turns it on
    except ImportError:
        return


def _read_line() -> str | None:
    """The user's next line; None at the end of input. Ctrl-C discards the current line, and so do wrong bytes."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
            line.encode()
            return line
        except EOFError:
            return None
        except KeyboardInterrupt:
            click.echo("\n(Ctrl-D leaves)", err=True)
        except UnicodeEncodeError:
            click.echo("(the line is not UTF-8; it was ignored)", err=True)


def _turn(model: Model, messages: list[dict[str, str]], first: int, options: dict[str, Any]) -> list[dict[str, str]]:
    """Print the answer as it is generated. The conversation with it; Ctrl-C keeps the part so far."""
    pieces: list[str] = []
    try:
        generation = _stream(model, messages, first, options)
        for piece in generation:
            pieces.append(piece)
            write_text(piece)
        click.echo()
        _say_if_cut(generation)
    except KeyboardInterrupt:
        click.echo(" (stopped)", err=True, nl=False)
        click.echo()
    return [*messages, {"role": "assistant", "content": "".join(pieces)}]


def _stream(model: Model, messages: list[dict[str, str]], first: int, options: dict[str, Any]) -> Generation:
    """Start an answer. A conversation longer than the context loses its oldest turns, never the system message."""
    while True:
        try:
            return model.stream(messages, **options)
        except ContextLengthError:
            if len(messages) <= first + 1:
                raise
            del messages[first : first + 2]
            click.echo("(the oldest turn no longer fits the context and was forgotten)", err=True)
