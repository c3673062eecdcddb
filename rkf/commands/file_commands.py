"""`rkf info`, `footprint`, `verify`, `diff`, `pack`, `unpack`, `split`, `join`: a file. Nothing here needs numba."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkf.commands.options import VALUES
from rkf.commands.output import print_json, print_map, print_table, progress_bar, reporter, size
from rkf.commands.quantities import Integer, Size
from rkf.model.program import Program
from rkf.text.terminal import printable

if TYPE_CHECKING:
    from rkf.file.structure import Structure

MODEL = click.argument("model", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
FORCE = click.option("--force", is_flag=True, help="Overwrite OUT.")


@click.command()
@MODEL
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--program", is_flag=True, help="List the ops of the model's forward pass.")
@click.option(
    "--context", type=Integer(1), metavar="N", help="Tokens whose memory is told (default: the model's context)."
)
@JSON
def info(model: Path, tensors: bool, program: bool, context: int | None, as_json: bool) -> None:
    """Describe a file. Reads only its directory; `rkf verify` checks the rest.

    MODEL: a file, or USER/REPO:FILE on the hub, of which only the directory is fetched.
    """
    from rkf.file.describe import describe
    from rkf.model.listing import listing

    with _structure(model) as container:
        description = describe(container, tensors=tensors)
        if container.model is not None:
            description["context"] = _context(container.model.program, context or container.model.context_length)
        ops = list(listing(container.model.program)) if program and container.model else []
    if as_json:
        print_json(description)
        return
    listed = description.pop("tensors", [])
    description["metadata"] = _short(description["metadata"])
    if "context" in description:
        memory = description["context"]
        description["context"] = f"{memory['tokens']} tokens take {_by_format(memory['bytes'])}"
        if any(memory["bytes_to_go_back"].values()):
            more = _by_format(memory["bytes_to_go_back"])
            description["context_of_a_chat"] = f"up to so much more, to go back to earlier lengths: {more}"
    print_map(description | {"file_bytes": f"{description['file_bytes']} ({size(description['file_bytes'])})"})
    if listed:
        click.echo()
        print_table([("tensor", "kind", "shape", "dtype", "k", "exceptions"), *map(_row, listed)])
    if ops:
        click.echo()
        for line in ops:
            click.echo(printable(line))


@contextmanager
def _structure(model: Path) -> Iterator[Structure]:
    """The structure of a file, or of one on the hub; an existing path wins."""
    from rkf.converters.hub import HubName, remote_structure, the_file
    from rkf.file.container import open_file

    name = HubName.parse(str(model))
    if name is not None and name.file is not None and not model.exists():
        yield remote_structure(the_file(name))
        return
    with open_file(model, check="structure") as container:
        yield container


def _by_format(taken: Mapping[str, int]) -> str:
    return ", ".join(f"{size(each)} in {number_format}" for number_format, each in taken.items())


def _context(program: Program, tokens: int) -> dict[str, Any]:
    """What a sequence of so many tokens takes in memory, in bytes, by the cache's format of numbers. bytes_to_go_back:
    at most so much more for a conversation, where states and windows need copies to go back to earlier lengths.
    """
    from rkf.runtime.kv_cache import FORMATS, CacheLayout

    layouts = {each: CacheLayout(program, each) for each in FORMATS}
    return {
        "tokens": tokens,
        "bytes": {each: layout.bytes_of(tokens) for each, layout in layouts.items()},
        "bytes_to_go_back": {each: layout.bytes_to_go_back(tokens) for each, layout in layouts.items()},
    }


def _short(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata without its program's maps; `description["program"]` summarises the program in one line."""
    if "model" not in metadata:
        return dict(metadata)
    return {**metadata, "model": {key: value for key, value in metadata["model"].items() if key != "program"}}


def _row(tensor: dict[str, Any]) -> tuple[object, ...]:
    shape = " x ".join(map(str, tensor["shape"]))
    note = f"alias of {tensor['target']}" if "target" in tensor else tensor["kind"]
    return tensor["name"], note, shape, tensor["dtype"], tensor.get("k", ""), tensor.get("exceptions", "")


@click.command()
@MODEL
@click.argument("source", required=False, type=click.Path(path_type=Path))
@JSON
def footprint(model: Path, source: Path | None, as_json: bool) -> None:
    """Account for every byte of a file. SOURCE, the checkpoint it was made from, adds the ratio."""
    from rkf.file.footprint import footprint as measure

    ledger = measure(model, source)
    if as_json:
        print_json(ledger)
        return
    sections, widths = ledger.pop("sections"), ledger.pop("widths")
    print_map(ledger)
    click.echo()
    print_table(
        [("bytes of", "", "share"), *((key, n, f"{n / ledger['file_bytes']:.2%}") for key, n in sections.items())]
    )
    if widths:
        click.echo()
        print_table([tuple(widths[0]), *(tuple(row.values()) for row in widths)])


@click.command()
@MODEL
@VALUES
@click.option("--structure", is_flag=True, help="Check the directory alone, also of USER/REPO:FILE on the hub.")
def verify(model: Path, values: Path | None, structure: bool) -> None:
    """Check a file completely.

    Checks structure, every hash, every index and weight; of one part of a model, structure and hashes. Exit code 3:
    corrupt, 4: unsupported, 5: not an rkf file.
    """
    from rkf.errors import UsageError
    from rkf.file.body import is_part, verify_part
    from rkf.file.verify import verify as check
    from rkf.text.tokenizer import open_tokenizer

    if structure:
        if values is not None:
            raise UsageError("--structure: omit --values")
        with _structure(model) as container:
            click.echo(
                f"{printable(model)}: valid structure: {len(container.tensors)} tensors, {size(container.file_bytes)}"
            )
        return
    if is_part(model):
        if values is not None:
            raise UsageError(f"{model}: is one part of a model: omit --values")
        part = verify_part(model)
        click.echo(
            f"{printable(model)}: valid: part {part.number} of {printable(part.index or 'a model')}, "
            f"{part.sections} sections in {size(part.file_bytes)}"
        )
        return
    with progress_bar("verify", "tensor") as bar:
        report = check(model, values=values, progress=lambda name: bar.update(), also=open_tokenizer)
    click.echo(
        f"{printable(model)}: valid: {report.tensors} tensors, {report.clustered} of them clustered, "
        f"{report.weights} weights in {size(report.file_bytes)}"
    )


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@JSON
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Show the differences between two files.

    Compares tensors, indices that moved, centroids that drifted, metadata. If one is USER/REPO:FILE on the hub, only
    the directories are compared: they show which tensors differ, not how much.
    """
    from rkf.file.diff import diff as compare
    from rkf.file.diff import structural_diff

    if a.exists() and b.exists():
        difference = compare(a, b)
    else:
        with _structure(a) as first, _structure(b) as second:
            difference = structural_diff(first, second)
    if as_json:
        print_json(difference)
    else:
        print_map(difference)


@click.command()
@MODEL
@click.argument("out", type=click.Path(path_type=Path))
@FORCE
def pack(model: Path, out: Path, force: bool) -> None:
    """Compress a file losslessly, for storage.

    The packed file holds the same model with its planes in zstd. It runs too, but is then decoded into memory.
    """
    from rkf.file.archive import pack as archive

    with progress_bar("pack", "B") as bar:
        archive(model, out, force=force, progress=reporter(bar))
    _sizes(model, out)


@click.command()
@MODEL
@click.argument("out", type=click.Path(path_type=Path))
@FORCE
def unpack(model: Path, out: Path, force: bool) -> None:
    """Undo `rkf pack`, byte for byte."""
    from rkf.file.archive import unpack as restore

    with progress_bar("unpack", "B") as bar:
        restore(model, out, force=force, progress=reporter(bar))
    _sizes(model, out)


def _sizes(source: Path, out: Path) -> None:
    from rkf.file.container import total_bytes

    click.echo(f"{printable(out)}: {size(total_bytes(out))}, from {size(total_bytes(source))}", err=True)


@click.command()
@MODEL
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--part-size",
    "part_bytes",
    type=Size(),
    metavar="SIZE",
    required=True,
    help="Bytes of a part, such as 4GB; its directory, some kB, comes on top.",
)
@FORCE
def split(model: Path, out: Path, part_bytes: int, force: bool) -> None:
    """Cut a model into parts, for disks and hosts that limit the size of a file.

    OUT becomes the index: the file that every command takes as the model. Its parts lie beside it as
    OUT-00001-of-00003.rkf, and so on, and each can be verified alone. A tensor's data are never cut, so one that is
    longer has a part of its own.
    """
    from rkf.file.container import files_of
    from rkf.file.split import split as cut

    with progress_bar("split", "B") as bar:
        cut(model, out, part_bytes=part_bytes, force=force, progress=reporter(bar))
    parts = [path.name for path in files_of(out)[1:]]
    click.echo(f"{printable(out)}: {len(parts)} parts, {printable(parts[0])} to {printable(parts[-1])}", err=True)


@click.command()
@MODEL
@click.argument("out", type=click.Path(path_type=Path))
@FORCE
def join(model: Path, out: Path, force: bool) -> None:
    """Undo `rkf split`, byte for byte. MODEL: the index."""
    from rkf.file.split import join as put_together

    with progress_bar("join", "B") as bar:
        put_together(model, out, force=force, progress=reporter(bar))
    _sizes(model, out)
