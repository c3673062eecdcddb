"""`rkf pull`, `convert`, `calibrate`, `export`: to and from other checkpoint formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkf.cache import cache_dir
from rkf.commands.default_model import NAME
from rkf.commands.output import progress_bar, reporter, size
from rkf.commands.quantities import MINUTES, THREAD_COUNT, Finite, Integer, Size
from rkf.commands.tune_command import showing, summary
from rkf.errors import UsageError
from rkf.file.atomic import refuse_existing, refuse_same_file, reporting
from rkf.text.terminal import printable

if TYPE_CHECKING:
    from rkf.calibrate.calibration import Calibrate
    from rkf.calibrate.devices import Device
    from rkf.converters.ledger import Ledger

DEVICE = click.option(
    "--device",
    type=click.Choice(["cpu", "cpu-torch", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where the passes over the calibration text run; cpu-torch and cuda need torch. Matrices are clustered on "
    "the CPU.",
)
FORCE = click.option("--force", is_flag=True, help="Overwrite OUT.")


@click.command()
@click.argument("name", default=NAME, metavar=f"[{NAME} | USER/REPO[:FILE]]")
def pull(name: str) -> None:
    """Fetch a checkpoint or an rkf file from the hub and print its path.

    Of a repository with one .rkf file, that file is fetched, and its parts if it is their index; FILE chooses one of
    several. All hashes are checked; what an earlier pull has fetched stays.
    """
    from rkf.converters.pull import pull as fetch

    click.echo(fetch(name))


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("name", metavar="USER/REPO[:FILE]")
@click.option("--licence", metavar="ID", help="The licence's identifier on the hub, such as apache-2.0.")
@click.option(
    "--quality",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with the output of `rkf eval … --json`, for the card. May be repeated.",
)
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--dry-run", is_flag=True, help="Print the card; upload nothing.")
def push(model: Path, name: str, licence: str | None, quality: tuple[Path, ...], private: bool, dry_run: bool) -> None:
    """Upload an rkf file to the hub, with a model card.

    The card is made from the file: how to run it, its size by bits, its recipe. The file is verified first.
    """
    from rkf.converters.hub import HubName
    from rkf.converters.hub import push as upload
    from rkf.converters.model_card import model_card
    from rkf.file.verify import verify

    target = HubName.parse(name)
    if target is None:
        raise UsageError(f"{name}: expected USER/REPO or USER/REPO:FILE")
    card = model_card(model, target, licence=licence, quality=quality)
    if dry_run:
        click.echo(card)
        return
    verify(model)
    click.echo(upload(model, target, card, private=private))


@click.command()
@click.argument("src")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--k", type=Integer(2, 256), help="Centroids per matrix, for a recipe that does not fix them.")
@click.option(
    "--size", "limit", type=Size(), metavar="BYTES", help="Maximum file size (91MB, 1.2GB); sets K for each matrix."
)
@click.option("--bpw", type=Finite(0, 32, min_open=True), help="Maximum bits per clustered weight, embedding included.")
@click.option("--archive", is_flag=True, help="Optimise for `rkf pack`: --size and --bpw then limit the packed file.")
@click.option(
    "--for",
    "cpu",
    type=click.Choice(["avx2"]),
    help="With --size or --bpw: use only widths that CPUs with AVX2 alone multiply fastest. They run the file faster, "
    "and it loses more at its size.",
)
@click.option(
    "--calibrate",
    metavar="self|FILE|quick|none",
    default="self",
    show_default=True,
    help="Calibration text: rkf's and some of the model's own (self), a file (also one from `rkf calibrate`), or "
    "none. A file with one kind of text serves that kind best and may harm others. quick: only scales are chosen, in "
    "seconds, on a short text of rkf's.",
)
@click.option(
    "--adapter",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The folder of a PEFT LoRA adapter: its products are added to the weights first.",
)
@click.option(
    "--recipe", metavar="FILE|dense", help="How to store each tensor: a TOML file, or the name of a built-in recipe."
)
@click.option(
    "--tune",
    "minutes",
    type=MINUTES,
    metavar="MINUTES",
    help="Then tune the file's values for this long, as `rkf tune` does. Needs torch.",
)
@DEVICE
@click.option("--workers", type=THREAD_COUNT, help="Default: one per core. Any number gives the same bytes.")
@click.option("--ray", metavar="ADDRESS", help="Cluster the matrices on a Ray cluster: auto, or HOST:PORT. Same bytes.")
@click.option(
    "--part-size",
    "part_bytes",
    type=Size(),
    metavar="SIZE",
    help="Write OUT as the index of parts of about this size, as `rkf split` does.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be written, but write nothing.")
@click.option(
    "--resume",
    is_flag=True,
    help="Resume an interrupted conversion. If given from the start, Ctrl-C keeps the finished part.",
)
@FORCE
def convert(
    src: str, out: Path, calibrate: str, device: str, limit: int | None, minutes: float | None, **options: Any
) -> None:
    """Convert a checkpoint to an rkf file.

    SRC: a Hugging Face folder, a hub id or a GGUF file. hub:USER/REPO keeps no copy of the weights: tensors are fetched
    as they are read. OUT: the file to write.
    """
    from rkf.calibrate.calibration import SHORT, Calibrate
    from rkf.calibrate.devices import device_of
    from rkf.converters.pipeline import convert as run

    if calibrate == "none" and device != "cpu":
        raise UsageError(f"--device {device}: nothing runs there with --calibrate none: omit it")
    where = device_of(device)
    with progress_bar("calibration text", "token") if calibrate == "self" else nullcontext() as bar:
        quick = calibrate == "quick"
        shown = reporter(bar) if bar is not None else None
        chosen = Calibrate(SHORT, device=where) if quick else calibration(calibrate, where, shown)
        given = {"size": limit, "calibrate": chosen, "compensate": not quick, **options}
        ledger = run(src, out, **given) if minutes is None or options["dry_run"] else _tuned(src, out, minutes, given)
    if options["dry_run"]:
        click.echo("\n".join(map(printable, ledger.lines())))
    else:
        click.echo(
            f"{printable(out)}: {size(ledger.file_bytes)}, {ledger.bits_per_weight:.3f} bits per weight", err=True
        )
    if ledger.left_out:
        click.echo(f"left out: {', '.join(map(printable, ledger.left_out))}; only the decoder is converted", err=True)
    for note in ledger.notes:
        click.echo(f"note: {printable(note)}", err=True)
    if limit is not None or options["bpw"] is not None:
        click.echo(f"chosen: {_chosen(ledger)}", err=True)


# What tuning adds to a file, at most: a record of it, and a factor for each matrix that had none.
_TUNED_BYTES, _TUNED_MATRIX_BYTES = 2048, 128


def _tuned(src: str, out: Path, minutes: float, options: dict[str, Any]) -> Ledger:
    """Convert, tune towards the source, and build the values into the file. An interruption leaves a folder beside
    `out`, from which `--resume` goes on.
    """
    from rkf.converters.pipeline import convert as run
    from rkf.converters.pipeline import refuse_inputs
    from rkf.converters.pull import locate
    from rkf.converters.source import open_source
    from rkf.file.container import total_bytes
    from rkf.file.fold import fold
    from rkf.file.private import private_folder
    from rkf.model.roles import clusterable
    from rkf.tune import tune as learn

    resume, force, part_bytes = options["resume"], options.pop("force"), options.pop("part_bytes")
    refuse_existing(out, force)
    source = locate(src)
    opened = open_source(source)
    refuse_inputs(out, source, opened, **{name: options[name] for name in ("recipe", "adapter", "calibrate")})
    if options["size"] is not None:
        added = _TUNED_BYTES + _TUNED_MATRIX_BYTES * len(clusterable(opened.model.program))
        options["size"] = max(options["size"] - added, 1)
    with reporting(out):
        out.parent.stat()
    folder = out.with_name(f"{out.name}.tuned")
    private_folder(folder)
    plain, dense, values = folder / "plain.rkf", folder / "dense.rkf", folder / "values.rkv"
    try:
        ledger = run(source, plain, **options, force=True)
        run(source, dense, recipe="dense", resume=resume, force=True)
        with progress_bar("tune", "") as bar:
            report = learn(plain, dense, values, minutes=minutes, resume=resume, force=True, progress=showing(bar))
        fold(plain, values, out, provenance={"tuned": report}, force=force, part_bytes=part_bytes)
        for path in (plain, dense, values):  # delete single files: the user may own a folder of this name
            with reporting(path):
                path.unlink()
    finally:
        with suppress(OSError):  # it is not empty: --resume goes on from it
            folder.rmdir()
    click.echo(summary(out, report), err=True)
    return replace(ledger, file_bytes=total_bytes(out))


def _chosen(ledger: Ledger) -> str:
    """The kinds of matrix for each K, and the bits per weight."""
    kinds: dict[str, Counter[str]] = {}
    for row in ledger.rows:
        if row.stored_as.startswith("K="):
            kinds.setdefault(row.stored_as, Counter())[row.name.split(".")[-2]] += 1
    parts = [
        f"{k}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
        for k, found in sorted(kinds.items(), key=lambda item: int(item[0][2:]))
    ]
    return f"{'; '.join(parts)}; {ledger.clustered_bits_per_weight:.3f} bits per clustered weight"


def calibration(choice: str, device: Device, progress: Callable[[int, int], None] | None = None) -> Calibrate | None:
    """The meaning of `--calibrate`. device: where its passes run. progress: of the text that a model generates."""
    if choice == "none":
        return None
    from rkf.calibrate.calibration import Calibrate

    store = cache_dir() / "calibrations"
    if choice == "self":
        return Calibrate(progress=progress, store=store, device=device)
    if not Path(choice).is_file():
        raise UsageError(f"--calibrate {choice}: no such file; expected self, none, or a file of text")
    return Calibrate(Path(choice), store=store, device=device)


@click.command()
@click.argument("src")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Default: rkf's and some of the model's own.",
)
@DEVICE
@FORCE
def calibrate(src: str, out: Path, text: Path | None, device: str, force: bool) -> None:
    """Prepare a calibration for `rkf convert`.

    It holds the tokens of a text and each matrix's loss on them; use it as `rkf convert --calibrate OUT`.

    SRC: a Hugging Face folder, a hub id or a GGUF file. OUT: the file to write.
    """
    from rkf.calibrate.calibration import Calibrate
    from rkf.calibrate.devices import device_of
    from rkf.calibrate.kept import save
    from rkf.cluster.allocation import coarse
    from rkf.converters.pull import locate
    from rkf.converters.rotated_source import RotatedSource
    from rkf.converters.source import open_source, refuse_source

    refuse_existing(out, force)
    refuse_same_file(out, text)
    where = device_of(device)
    with progress_bar("calibration text", "token") as bar:
        path = locate(src)
        source = open_source(path)
        refuse_source(out, path, source)
        made = Calibrate(text, reporter(bar), cache_dir() / "calibrations", where)(source, out.parent)
    for note in made.notes:
        click.echo(f"note: {printable(note)}", err=True)
    losses = made.of(RotatedSource(source)).losses(coarse)
    source.refuse_changed()
    save(out, made.kept(losses), force)
    click.echo(f"{printable(out)}: {made.tokens.shape[0]} x {made.tokens.shape[1]} tokens", err=True)


@click.group()
def export() -> None:
    """Write a model in another format."""


@export.command("hf")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["bf16", "f16", "f32"]), help="Of all tensors. Default: the source's.")
def export_hf(model: Path, out: Path, dtype: str | None) -> None:
    """Write a folder that transformers loads.

    MODEL: an rkf file. OUT: the folder to create. The weights are decoded.
    """
    from rkf.converters.export import export_hf as run

    run(model, out, dtype=dtype)


@export.command("gguf")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--type",
    "type_name",
    type=click.Choice(["f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]),
    default="f16",
    show_default=True,
    help="Of matrices; those whose rows do not fill its blocks are f16.",
)
@FORCE
def export_gguf(model: Path, out: Path, type_name: str, force: bool) -> None:
    """Write a GGUF file that llama.cpp loads.

    MODEL: an rkf file. OUT: the file to write. The weights are decoded, then stored in the type.
    """
    from rkf.converters.export import export_gguf as run

    for note in run(model, out, type_name=type_name, force=force):
        click.echo(f"note: {printable(note)}", err=True)


@export.command("transformers")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def export_transformers(model: Path, out: Path) -> None:
    """Write a folder that transformers loads clustered, as small as the file.

    MODEL: an rkf file. OUT: the folder to create. Python code that loads it imports rkf.bridges.transformers first.
    """
    from rkf.bridges.transformers_export import export_transformers as run

    decoded = run(model, out)
    if decoded:
        click.echo(
            f"{printable(out)}: {len(decoded)} tensors are dense, because no layer of transformers' model holds one of "
            f"them alone: {printable(decoded[0])}, …",
            err=True,
        )


@click.command()
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@FORCE
def restore(src: Path, out: Path, force: bool) -> None:
    """Write an rkf file from a folder of `rkf export transformers`.

    SRC: the folder, also one that transformers saved again. OUT: the file to write; it has the same ranks.
    """
    from rkf.bridges.transformers_restore import restore as run

    run(src, out, force=force)
