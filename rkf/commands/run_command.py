"""`rkf run`: answers one prompt."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from rkf.commands.answering import (
    MODEL,
    answering_options,
    load_model,
    loading_options,
    say_if_cut,
    say_recommended,
    session,
)
from rkf.commands.options import answer_keywords
from rkf.commands.output import write_text
from rkf.commands.several_processes import one_of_several
from rkf.errors import UsageError
from rkf.text.reading import read_stream, read_text

if TYPE_CHECKING:
    from rkf.runtime.generate import Generation

_STDIN = "-"


@click.command()
@MODEL
@click.argument("pipe", metavar="[-]", required=False, type=click.Choice([_STDIN]))
@click.option("--prompt", metavar="TEXT", help="The prompt to answer. Default, or with -: what stdin gives.")
@click.option(
    "--prompt-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A UTF-8 file with the prompt."
)
@answering_options
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--tensor-parallel", is_flag=True, help="Share the model among torchrun's processes (docs/scale.md).")
@click.option("--stats", is_flag=True, help="Print times and rates to stderr.")
def run(
    model: Path | None,
    pipe: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    stats: bool,
    system: str | None,
    raw: bool,
    session_file: Path | None,
    **options: Any,
) -> None:
    """Answer one prompt. Without MODEL: SmolLM2-135M-Instruct, fetched and converted once.

    Without sampling options those apply that the model's authors recommend; if there are none, temperature 0.
    """
    if model == Path(_STDIN):
        model, pipe = None, _STDIN
    if pipe is not None and (prompt is not None or prompt_file is not None):
        raise UsageError("- reads the prompt from stdin: omit it, or --prompt and --prompt-file")
    if options["tensor_parallel"] and prompt in (None, _STDIN) and prompt_file is None:
        raise UsageError("--tensor-parallel: processes cannot share stdin: give --prompt TEXT or --prompt-file FILE")
    text = _prompt(prompt, prompt_file)
    loading = loading_options(options)
    keywords = answer_keywords(options)
    began = perf_counter()
    with ExitStack() as stack:
        seed = stack.enter_context(one_of_several(loading["device"])) if loading["tensor_parallel"] else None
        ready = stack.enter_context(load_model(model, **loading))
        loaded = perf_counter()
        if seed is not None:
            keywords.setdefault("seed", seed)
        say_recommended(ready, keywords)
        with session(ready, session_file):
            generation = ready.stream(text, system=system, raw=raw, **keywords)
            for piece in generation:
                write_text(piece)
            click.echo()
        say_if_cut(generation)
        if stats:
            click.echo(_stats(generation, loaded - began), err=True)


def _prompt(text: str | None, file: Path | None) -> str:
    """The prompt from an option, a file or stdin; a line break at the end of the latter two is not part of it."""
    if text is not None and file is not None:
        raise UsageError("--prompt and --prompt-file exclude each other: give one")
    if file is None and text is not None and text != _STDIN:
        return text
    if file is not None:
        found = read_text(file)
    else:
        found = "" if text is None and sys.stdin.isatty() else read_stream(sys.stdin.buffer, "stdin")
    found = found.removesuffix("\n").removesuffix("\r")
    if not found:
        raise UsageError("no prompt: give --prompt TEXT or --prompt-file FILE, or pipe it in")
    return found


def _stats(generation: Generation, load_s: float) -> str:
    stats = generation.stats
    steps = max(stats.tokens - 1, 0)  # the prompt's pass gives the first token
    cached = generation.request.cached_tokens
    known = f" ({cached} of them known)" if cached else ""
    prefill = (stats.prompt_tokens - cached) / stats.prefill_s if stats.prefill_s else 0.0
    decode = steps / stats.decode_s if stats.decode_s else 0.0
    return (
        f"load {load_s:.2f} s, prompt {stats.prompt_tokens} tokens{known} "
        f"{stats.prefill_s:.2f} s ({prefill:.1f} tok/s), "
        f"answer {stats.tokens} tokens {stats.decode_s:.2f} s ({decode:.1f} tok/s), first token after "
        f"{load_s + stats.prefill_s:.2f} s"
    )
