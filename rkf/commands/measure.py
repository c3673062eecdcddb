"""`rkf eval` and `rkf bench`: the quality and the speed of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkf.commands.options import ADAPTER, BITS, KV_CACHE, THREADS, VALUES
from rkf.commands.output import print_json, print_table, progress_bar, reporter, size
from rkf.commands.quantities import Integer
from rkf.text.reading import read_text

if TYPE_CHECKING:
    from rkf.eval.reference import Window

MODEL = click.argument("model", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("eval")
def evaluate() -> None:
    """Measure the quality of a model."""


@evaluate.command()
@MODEL
@click.option(
    "--text", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="UTF-8 text to predict."
)
@click.option(
    "--ctx", type=Integer(4), default=512, show_default=True, help="Tokens per window; its second half is scored."
)
@click.option("--windows", type=Integer(1), help="Use only this many windows, from the start.")
@VALUES
@ADAPTER
@KV_CACHE
@BITS
@JSON
def ppl(model: Path, text: Path, ctx: int, windows: int | None, as_json: bool, **options: Any) -> None:
    """Perplexity on a text, measured as llama.cpp does."""
    from rkf.eval.perplexity import perplexity
    from rkf.runtime.model import load

    words = read_text(text)
    with load(model, **options) as ready, progress_bar("eval ppl", "window") as bar:
        result = perplexity(ready, words, ctx=ctx, windows=windows, progress=reporter(bar))
    if as_json:
        print_json(result)
    else:
        click.echo(f"ppl {result['ppl']:.4f} ± {result['ppl_stderr']:.4f} over {result['tokens']} tokens")


@evaluate.command()
@MODEL
@click.option(
    "--reference",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="The model that MODEL was made from: an rkf file, a checkpoint, or a .kld file.",
)
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="UTF-8 text to predict.")
@click.option(
    "--ctx", type=Integer(4), default=512, show_default=True, help="Tokens per window; its second half is scored."
)
@click.option("--windows", type=Integer(1), help="Use only this many windows, from the start.")
@click.option("--save", type=click.Path(path_type=Path), help="Also write the reference's predictions to a .kld file.")
@click.option("--force", is_flag=True, help="Overwrite the file of --save.")
@click.option("--exact", is_flag=True, help="Run MODEL in f32 throughout; `rkf run` uses integer products.")
@VALUES
@ADAPTER
@KV_CACHE
@BITS
@JSON
def kld(
    model: Path,
    exact: bool,
    values: Path | None,
    adapter: Path | None,
    kv_cache: str | None,
    bits: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Divergence of a model's predictions from its reference's.

    Prints mean KL divergence in nats per token, agreement on the most likely token, ratio of perplexities. If the
    reference is a checkpoint or an rkf file, it needs --text; a .kld file holds the text's tokens. The reference runs
    in f32.
    """
    from rkf.eval.divergence import divergence
    from rkf.runtime.model import load

    with ExitStack() as stack:
        reference = stack.enter_context(_reference(**options, others=(model, values, *_files_in(adapter))))
        ready = stack.enter_context(
            load(model, exact=exact, values=values, adapter=adapter, kv_cache=kv_cache, bits=bits)
        )
        bar = stack.enter_context(progress_bar("eval kld", "window"))
        result = divergence(ready, reference, total=options["windows"] or 0, progress=reporter(bar))
    if as_json:
        print_json(result)
        return
    click.echo(f"kld {result['kld']:.5f} ± {result['kld_stderr']:.5f} over {result['tokens']} tokens")
    click.echo(f"median {result['kld_median']:.5f}, 99 % {result['kld_p99']:.4f}, maximum {result['kld_max']:.3f}")
    click.echo(f"top-1 {result['top1']:.2%}, ppl {result['ppl']:.3f} = {result['ppl_ratio']:.4f} x the reference's")
    click.echo(f"noise floor {result['noise_floor']:.5f} (the reference's own logits in 16 bits)")


@evaluate.command()
@MODEL
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--items", type=Integer(1), help="Use only this many items, from the start.")
@click.option("--exact", is_flag=True, help="Run MODEL in f32 throughout; `rkf run` uses integer products.")
@VALUES
@ADAPTER
@JSON
def choices(model: Path, file: Path, items: int | None, as_json: bool, **options: Any) -> None:
    """Share of multiple-choice questions answered correctly.

    FILE: lines of JSON, {"context": "…", "endings": ["…", "…"], "label": 0}. The model chooses the ending with the
    highest log-likelihood per byte.
    """
    from rkf.eval.choices import choices as run
    from rkf.eval.choices import parse
    from rkf.runtime.model import load

    questions = parse(read_text(file), file.name)[:items]
    with load(model, **options) as ready, progress_bar("eval choices", "item") as bar:
        result = run(ready, questions, progress=reporter(bar))
    if as_json:
        print_json(result)
    else:
        click.echo(f"accuracy {result['accuracy']:.2%} ± {result['accuracy_stderr']:.2%} over {result['items']} items")
        click.echo(f"guessing {result['chance']:.2%}")


@evaluate.command()
@MODEL
@click.option("--tasks", required=True, metavar="NAME,…", help="Tasks of lm-evaluation-harness, or of --include-path.")
@click.option(
    "--include-path", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A folder with own tasks."
)
@click.option("--num-fewshot", type=Integer(0), help="Examples before each question (default: the task's).")
@click.option("--limit", type=Integer(1), help="Use only this many items of each task.")
@click.option("--apply-chat-template", is_flag=True, help="Ask through the model's chat template.")
@click.option("--batch-size", type=Integer(1), default=16, show_default=True, help="Requests that run together.")
@click.option("--exact", is_flag=True, help="Run MODEL in f32 throughout; `rkf run` uses integer products.")
@VALUES
@ADAPTER
@KV_CACHE
@JSON
def tasks(model: Path, as_json: bool, **options: Any) -> None:
    """Scores on tasks of EleutherAI's lm-evaluation-harness. Needs the lm-eval extra."""
    from rkf.bridges.harness import tasks as run

    result = run(model, **options)
    if as_json:
        print_json(result)
        return
    rows = [(task, name, f"{value:.4f}") for task, found in result.items() for name, value in found.items()]
    print_table([("task", "score", ""), *rows])


@contextmanager
def _reference(
    reference: Path,
    text: Path | None,
    ctx: int,
    windows: int | None,
    save: Path | None,
    force: bool,
    others: tuple[Path | None, ...],
) -> Iterator[Iterable[Window]]:
    """The windows of a .kld file, or of a model over a text; the latter are saved once all have been used. others:
    files that the same command reads.
    """
    from rkf.errors import UsageError
    from rkf.eval import reference as stored
    from rkf.eval.divergence import sampled, windows_of
    from rkf.file.atomic import refuse_existing
    from rkf.file.container import refuse_input
    from rkf.runtime.model import load

    if reference.suffix == ".kld":
        if text or save:
            raise UsageError(f"{reference}: already holds its text: omit --text and --save")
        yield stored.read(reference)[:windows]
        return
    if text is None:
        raise UsageError(f"{reference}: a model as the reference needs --text")
    if save:
        refuse_existing(save, force)
        refuse_input(save, reference, text, *others)
        _refuse_checkpoint(save, reference)
    with _as_rkf(reference) as path, load(path, exact=True) as dense:
        kept: list[Window] = []

        def keeping() -> Iterator[Window]:
            for number, window in enumerate(windows_of(dense, read_text(text), ctx=ctx, windows=windows)):
                if save:
                    kept.append(sampled(window, number))
                yield window

        yield keeping()
    if save:
        stored.write(save, kept, force)


def _files_in(folder: Path | None) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder else []


def _refuse_checkpoint(save: Path, reference: Path) -> None:
    from rkf.converters.source import open_source, refuse_source

    if reference.is_dir():
        refuse_source(save, reference, open_source(reference))


@contextmanager
def _as_rkf(path: Path) -> Iterator[Path]:
    """The path of an rkf file; for another checkpoint, that of its dense conversion, which is deleted afterwards."""
    from rkf.converters.pipeline import convert
    from rkf.file.scratch import scratch

    if path.is_file() and path.suffix != ".gguf":
        yield path
        return
    with scratch() as folder:
        dense = folder / "dense.rkf"
        convert(path, dense, recipe="dense")
        yield dense


@click.command()
@MODEL
@THREADS
@KV_CACHE
@BITS
@click.option("--prefill", type=Integer(1), default=512, show_default=True, help="Tokens of the timed prompt.")
@click.option("--decode", type=Integer(1), default=128, show_default=True, help="Tokens generated one by one.")
@click.option("--batch", type=Integer(1, 1024), default=1, show_default=True, help="Also time this many sequences.")
@JSON
def bench(model: Path, as_json: bool, **options: Any) -> None:
    """Measure speed and memory on this machine."""
    from rkf.runtime.bench import bench as measure

    result = measure(model, **options)
    if as_json:
        print_json(result)
        return
    click.echo(f"prefill {result['prefill_tok_s']:.1f} tok/s, decode {result['decode_tok_s']:.1f} tok/s")
    if "batch_tok_s" in result:
        click.echo(f"{options['batch']} sequences together: decode {result['batch_tok_s']:.1f} tok/s")
    click.echo(f"load {result['load_s']:.2f} s, first token after {result['first_token_s']:.2f} s")
    shared = f", {size(result['mapped_bytes'])} of it pages of the file" if "mapped_bytes" in result else ""
    click.echo(f"{size(result['rss_bytes'])} resident{shared}")
