"""`rkf eval` and `rkf bench`: how good and how fast a model is."""

from __future__ import annotations

from pathlib import Path

import click

from rkf.commands.output import print_json, progress_bar, reporter, size

MODEL = click.argument("model", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("eval")
def evaluate() -> None:
    """Measure how good a model is."""


@evaluate.command()
@MODEL
@click.option(
    "--text", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="UTF-8 text to predict."
)
@click.option("--ctx", type=int, default=512, show_default=True, help="Tokens a window; its second half is scored.")
@click.option("--windows", type=click.IntRange(1), help="Take only the first so many windows.")
@JSON
def ppl(model: Path, text: Path, ctx: int, windows: int | None, as_json: bool) -> None:
    """Perplexity on a text, by llama.cpp's protocol."""
    from rkf.errors import UsageError
    from rkf.eval.perplexity import perplexity
    from rkf.runtime.model import load

    try:
        words = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{text}: expected UTF-8 text: {error}") from error
    with load(model) as ready, progress_bar("eval ppl", "window") as bar:
        result = perplexity(ready, words, ctx=ctx, windows=windows, progress=reporter(bar))
    if as_json:
        print_json(result)
    else:
        click.echo(f"ppl {result['ppl']:.4f} ± {result['ppl_stderr']:.4f} over {result['tokens']} tokens")


@click.command()
@MODEL
@click.option("--threads", type=click.IntRange(1), help="Default: one a core.")
@click.option("--prefill", type=int, default=512, show_default=True, help="Tokens of the prompt that is timed.")
@click.option("--decode", type=int, default=128, show_default=True, help="Tokens generated one by one.")
@JSON
def bench(model: Path, threads: int | None, prefill: int, decode: int, as_json: bool) -> None:
    """Speed and memory on this machine."""
    from rkf.runtime.bench import bench as measure

    result = measure(model, threads=threads, prefill=prefill, decode=decode)
    if as_json:
        print_json(result)
        return
    click.echo(f"prefill {result['prefill_tok_s']:.1f} tok/s, decode {result['decode_tok_s']:.1f} tok/s")
    click.echo(f"load {result['load_s']:.2f} s, first token after {result['first_token_s']:.2f} s")
    click.echo(f"{size(result['rss_bytes'])} resident")
