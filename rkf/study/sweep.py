"""`sweep`: one checkpoint at every K, with and without exact outliers, and the matrix that collapses without them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from blake3 import blake3

from rkf.file.container import Container, open_file
from rkf.file.footprint import footprint
from rkf.file.writer import Writer
from rkf.format.canonical import encode
from rkf.format.matrix import Alias
from rkf.study import report
from rkf.study.charts import Chart, Row, having, only
from rkf.study.records import Records
from rkf.study.running import Progress, do, predictions
from rkf.study.subject import Probe, Trial, chosen_layers, clustered_in_layers

ABOUT = """Every matrix of the layers has K shared values; the embedding stays dense. plain: the optimal k-means of each
matrix; exceptions: the largest 0.1 % of every matrix stay exact; calibrated: the same, with ranks chosen for the
layer's outputs on a text. Further trials at one K start from the model with exceptions: one layer at a time becomes
plain; then, in the layer that suffers most, one matrix at a time; finally all matrices are plain except that one."""

KS = (4, 8, 16, 32, 64, 128, 256)
COLLAPSE_K = 16  # K of the trials with single layers and matrices
RECIPES = {"plain": "paper", "exceptions": "paper-exceptions", "calibrated": "paper-exceptions"}


class Convert(Protocol):
    """Converts the checkpoint by a built-in recipe. calibrated: with the calibration chosen by the caller."""

    def __call__(self, out: Path, *, recipe: str, k: int | None, calibrated: bool) -> None: ...


def sweep(
    out: str | PathLike[str],
    *,
    convert: Convert,
    source: str,
    fingerprint: str,
    text: str,
    ks: Iterable[int] | None = None,
    calibration: str | None = None,
    layers: Iterable[int] | None = None,
    windows: int = 8,
    ctx: int = 512,
    threads: int | None = None,
    progress: Progress = lambda trial, done, total: None,
) -> list[Row]:
    """Convert, measure, and find the matrix that collapses. Returns the rows of all trials; those in `out` are not
    repeated.

    source, fingerprint: the name of the checkpoint, and a hash of its files. text, windows, ctx: as in
    `rkf.study.study`; divergence is measured from the dense checkpoint. ks: default KS. calibration: also convert with
    calibration, on the checkpoint's own text ("self") or another (its hash). layers: those to make plain (default:
    all). Models are made in a folder of `out`, which is removed at the end.
    """
    out, ks, layers = Path(out), list(ks or KS), layers and list(layers)
    identity = [fingerprint, windows, ctx, blake3(text.encode()).hexdigest()]
    if calibration not in (None, "self"):  # the checkpoint's own text depends only on the checkpoint, hashed already
        identity.append(calibration)
    about: dict[str, Any] = {
        "study": "sweep",
        "model": source,
        "reference": "the checkpoint, dense",
        "windows": windows,
        "ctx": ctx,
        "fingerprint": blake3(encode(identity)).hexdigest(),
    }
    about["command"] = (
        f"rkf study sweep {source} OUT --text TEXT --windows {windows} --ctx {ctx} --k {','.join(map(str, ks))}"
        + (f" --calibrate {'self' if calibration == 'self' else 'FILE'}" if calibration else "")
        + (f" --layers {','.join(map(str, layers))}" if layers else "")
    )
    records = Records(out, about)
    models = Models(records.own("models"), convert)
    found = predictions(records, models.dense, text, ctx, windows, exact=True, threads=threads)
    probe = Probe(found, threads)
    variants = [variant for variant in RECIPES if calibration or variant != "calibrated"]
    do(records, [_of_k(models, probe, variant, k) for k in ks for variant in variants], progress)
    if COLLAPSE_K in ks:
        for stage in (_by_layer, _by_kind, _spared):
            do(records, stage(models, probe, layers, records.rows), progress)
        if "matrices" not in records.about:
            records.about["matrices"] = largest_weights(models)
            records.save()
    models.remove()
    report.write(out, "Study: sweep", ABOUT, records.about, charts(records.rows, records.about.get("matrices", [])))
    return records.rows


class Models:
    """The folder of converted models, each made on first use."""

    def __init__(self, folder: Path, convert: Convert) -> None:
        self._folder, self._convert = folder, convert

    def dense(self) -> Path:
        return self._made("dense", recipe="dense", k=None, calibrated=False)

    def clustered(self, variant: str, k: int) -> Path:
        return self._made(f"{variant}-{k}", recipe=RECIPES[variant], k=k, calibrated=variant == "calibrated")

    def exchanged(self, base: str, other: str, chosen: Callable[[str], bool]) -> Path:
        """The model of variant `base` with some matrices (chosen by name) of variant `other`."""
        path = self._folder / "exchanged.rkf"
        with (
            open_file(self.clustered(base, COLLAPSE_K)) as one,
            open_file(self.clustered(other, COLLAPSE_K)) as two,
            Writer(path, metadata=one.metadata, provenance={"study": "sweep"}, force=True) as writer,
        ):
            for name, entry in one.tensors.items():
                loaded = (two if chosen(name) else one).load(name)
                writer.add(name, loaded if entry.target is None else Alias(entry.target))
            for blob in sorted(one.directory.blobs):
                writer.blob(blob, one.blob(blob) or b"")
        return path

    def remove(self) -> None:
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def _made(self, name: str, **options: Any) -> Path:
        path = self._folder / f"{name}.rkf"
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._convert(path, **options)
        return path


def _of_k(models: Models, probe: Probe, variant: str, k: int) -> Trial:
    def measure() -> dict[str, Any]:
        path = models.clustered(variant, k)
        figures = {**probe(path), "bits": footprint(path)["clustered_bits_per_weight"]}
        if k != COLLAPSE_K:  # models of that K are used again
            path.unlink()
        return figures

    return Trial({"variant": variant, "k": k, "layer": None, "kind": None}, measure)


def _by_layer(models: Models, probe: Probe, layers: Iterable[int] | None, rows: list[Row]) -> Iterator[Trial]:
    with open_file(models.clustered("exceptions", COLLAPSE_K)) as container:
        chosen = chosen_layers(container, layers)
    for layer in chosen:
        yield _exchange(models, probe, "one plain", layer, None)


def _by_kind(models: Models, probe: Probe, layers: Iterable[int] | None, rows: list[Row]) -> Iterator[Trial]:
    with open_file(models.clustered("exceptions", COLLAPSE_K)) as container:
        kinds = list(dict.fromkeys(kind for _, kind in clustered_in_layers(container).values()))
    layer = worst(only(rows, variant="one plain", kind=None))["layer"]
    for kind in kinds:
        yield _exchange(models, probe, "one plain", layer, kind)


def _spared(models: Models, probe: Probe, layers: Iterable[int] | None, rows: list[Row]) -> Iterator[Trial]:
    row = worst(having(rows, "kind"))
    yield _exchange(models, probe, "all but one plain", row["layer"], row["kind"])


def _exchange(models: Models, probe: Probe, variant: str, layer: int, kind: str | None) -> Trial:
    base, other = ("exceptions", "plain") if variant == "one plain" else ("plain", "exceptions")

    def measure() -> dict[str, Any]:
        with open_file(models.clustered(base, COLLAPSE_K)) as container:
            places = clustered_in_layers(container)
        wanted = {name for name, (at, found) in places.items() if at == layer and kind in (None, found)}
        return probe(models.exchanged(base, other, wanted.__contains__))

    return Trial({"variant": variant, "k": COLLAPSE_K, "layer": layer, "kind": kind}, measure)


def worst(rows: list[Row]) -> Row:
    """The trial with the largest divergence."""
    return max(rows, key=lambda row: float(row["kld"]))


def largest_weights(models: Models) -> list[Row]:
    """For every matrix, in standard deviations: "largest", its largest weight by magnitude; "stored", that weight after
    plain clustering; "error", the root mean square of the change by clustering.
    """
    with ExitStack() as stack:
        dense = stack.enter_context(open_file(models.dense()))
        plain = stack.enter_context(open_file(models.clustered("plain", COLLAPSE_K)))
        return [
            {"name": name, "layer": layer, "kind": kind, **_largest(dense, plain, name)}
            for name, (layer, kind) in clustered_in_layers(plain).items()
        ]


def _largest(dense: Container, plain: Container, name: str) -> dict[str, float]:
    weights, stored = dense.decode(name).reshape(-1), plain.decode(name).reshape(-1)
    deviation = weights.std(dtype=np.float64)
    at = int(np.abs(weights).argmax())
    return {
        "largest": float(abs(weights[at]) / deviation),
        "stored": float(stored[at] * np.sign(weights[at]) / deviation),
        "error": float(np.sqrt(np.mean((stored - weights) ** 2, dtype=np.float64)) / deviation),
    }


def charts(rows: list[Row], matrices: list[Row]) -> list[Chart]:
    by_k = [row for row in only(rows, layer=None) if row["variant"] in RECIPES]
    plain = only(rows, variant="one plain")
    return [
        Chart("k", "Perplexity by K", by_k, x="k", series="variant"),
        Chart("bits", "Divergence by bits per clustered weight", by_k, x="bits", series="variant", y="kld"),
        Chart("layers", f"K = {COLLAPSE_K}: one layer plain", only(plain, kind=None), x="layer"),
        Chart("kinds", f"K = {COLLAPSE_K}: one matrix of that layer plain", having(plain, "kind"), x="kind"),
        Chart("spared", f"K = {COLLAPSE_K}: all plain but that matrix", _ends(rows), x="variant"),
        Chart("largest", "The largest weight of each matrix", matrices, x="layer", series="kind", y="largest"),
    ]


def _ends(rows: list[Row]) -> list[Row]:
    at = only(rows, k=COLLAPSE_K)
    return [row for name in ("plain", "all but one plain", "exceptions") for row in only(at, variant=name)]
