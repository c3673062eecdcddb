"""`rkf serve`: models over HTTP, in OpenAI's protocol, with a web chat."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import click

from rkf.commands.default_model import model_path
from rkf.commands.options import ADAPTER, BITS, DRAFT, KV_CACHE, THREADS, VALUES, answer_keywords, answer_options
from rkf.commands.quantities import Integer, Size
from rkf.errors import RkfError, UsageError
from rkf.text.reading import read_text

_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^\s/?#]+")  # as browsers send it: without a path


@click.command("serve")
@click.argument("models", nargs=-1, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at; 0.0.0.0 for all.")
@click.option("--port", type=Integer(0, 65535), default=8080, show_default=True, help="0: any free one.")
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with one key per line; requests then need one of them.",
)
@click.option("--allow-origin", multiple=True, metavar="URL", help="Let web pages of this origin use the server.")
@click.option("--parallel", type=Integer(1, 1024), default=16, show_default=True, help="Requests at once.")
@click.option("--queue", type=Integer(0), default=256, show_default=True, help="Requests that may wait.")
@click.option("--ctx", type=Integer(2), help="Maximum tokens of a conversation. Default: the model's.")
@click.option(
    "--cache-memory", type=Size(), metavar="SIZE", help="Memory of keys and values. Default: half of what is available."
)
@click.option("--drain", type=Integer(0), default=30, show_default=True, help="Seconds to finish on SIGTERM.")
@click.option(
    "--pooling",
    type=click.Choice(["mean", "last"]),
    default="mean",
    show_default=True,
    help="Embeddings: the mean of all tokens' hidden states, or the last token's.",
)
@answer_options(max_tokens=None)
@VALUES
@ADAPTER
@THREADS
@KV_CACHE
@BITS
@DRAFT
def serve_command(
    models: tuple[Path, ...],
    host: str,
    port: int,
    api_key_file: Path | None,
    allow_origin: tuple[str, ...],
    parallel: int,
    queue: int,
    ctx: int | None,
    cache_memory: int | None,
    drain: int,
    pooling: Literal["mean", "last"],
    values: Path | None,
    adapter: Path | None,
    threads: int | None,
    kv_cache: str | None,
    bits: int | None,
    draft: Path | None,
    **options: Any,
) -> None:
    """Serve models over HTTP in OpenAI's protocol, with a web chat at /. docs/serve.md explains it.

    Each model has its file's name. Without MODELS: SmolLM2-135M-Instruct. Answer options are the defaults of requests.
    """
    try:
        from rkf.serve.app import serve
        from rkf.serve.catalogue import EngineOptions, named
    except ImportError as error:
        raise RkfError(f"rkf serve needs {error.name}: pip install 'rkf-llm[serve]'") from None
    for name, given in (("--values", values), ("--adapter", adapter), ("--draft", draft)):
        if given is not None and len(models) > 1:
            raise UsageError(f"{name} is for one model: serve that alone")
    if not host.strip():  # a server would listen at every address
        raise UsageError("--host: expected an address; 0.0.0.0 for all")
    for origin in allow_origin:
        if not _ORIGIN.fullmatch(origin):
            raise UsageError(f"--allow-origin: expected an origin such as https://example.com, got {origin!r}")
    defaults = answer_keywords(options)
    serve(
        named([model_path(model) for model in models or (None,)]),
        host=host,
        port=port,
        load_options={
            "values": values,
            "adapter": adapter,
            "threads": threads,
            "kv_cache": kv_cache,
            "bits": bits,
            "draft": draft and model_path(draft),
        },
        engine_options=EngineOptions(ctx, parallel, queue, cache_memory),
        drain_seconds=drain,
        defaults=defaults,
        pooling=pooling,
        keys=_keys(api_key_file),
        origins=allow_origin,
    )


def _keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    keys = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not keys:
        raise UsageError(f"{path}: expected at least one key, one per line")
    return keys
