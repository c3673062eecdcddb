"""`convert`: a checkpoint to an .rkf file. Runs the steps of a conversion in order; each step has its own module.

Tensors are read, clustered by worker threads and written in name order. So the bytes depend neither on the number of
workers nor on which finishes first. Only a bounded number of weights is in memory at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from rkf import __version__
from rkf.cluster import allocation
from rkf.cluster.clustering import Clustered, cluster_alike
from rkf.cluster.compensate import Objectives, objectives
from rkf.cluster.histogram import few_distinct
from rkf.cluster.recipe import Recipe
from rkf.converters.adapter import CONFIG, WEIGHTS, AdaptedSource, Adapter
from rkf.converters.budget import archive as archived
from rkf.converters.budget import fitting
from rkf.converters.calibrating import Calibrator, GivenCalibration
from rkf.converters.ledger import Ledger, LedgerRow, Rehearsal, blank, row
from rkf.converters.progress import Progress, Step, bar
from rkf.converters.pull import locate
from rkf.converters.rotated_source import RotatedSource
from rkf.converters.source import Source, open_source, refuse_source, stored_head
from rkf.converters.work import WorkFolder
from rkf.errors import UsageError, naming
from rkf.file.atomic import refuse_existing, refuse_same_file
from rkf.file.container import total_bytes
from rkf.file.part_writer import check_part_bytes
from rkf.file.writer import Writer
from rkf.format import codec
from rkf.format.constants import CHAT_TEMPLATE, MAX_K, MIN_K, TOKENIZER
from rkf.format.matrix import Alias, ClusteredMatrix, Tensor
from rkf.model.roles import clusterable
from rkf.worker_threads import WorkerThreads

if TYPE_CHECKING:
    from rkf.converters.ray_tasks import RayMachines

# Weights that may be in memory beyond one large matrix. Clustering takes up to 9 bytes a weight: 0.3 GB.
_IN_FLIGHT = 1 << 25

_Result = tuple[Tensor, dict[str, float]]
_T = TypeVar("_T")


def convert(
    src: str | Path,
    out: str | Path,
    *,
    k: int | None = None,
    recipe: str | Path | None = None,
    size: int | None = None,
    bpw: float | None = None,
    archive: bool = False,
    cpu: str | None = None,
    adapter: str | Path | None = None,
    calibrate: Calibrator | None = None,
    compensate: bool = True,
    workers: int | None = None,
    ray: str | None = None,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    part_bytes: int | None = None,
    progress: Progress | None = None,
) -> Ledger:
    """Convert the checkpoint `src` to the file `out`. Returns the ledger of the stored tensors.

    src: a Hugging Face folder, a GGUF file, a name to fetch (`rkf.converters.pull`), or hub:USER/REPO, of which only
    what is read is fetched (`rkf.converters.hub_checkpoint`). adapter: the folder of a PEFT
    LoRA adapter, whose products are added to the weights (`rkf.converters.adapter`).
    calibrate: makes the second moments on a calibration text (`rkf.calibrate.calibration`); None clusters without data.
    With it, budgets and recipes that have options for rotated tensors rotate the program (`rkf.model.rotation`).
    compensate: choose indices for the least error of outputs on the text. False: the text only scales the inputs of
    rotated matrices (`rkf.converters.input_scales`), for which a short one will do; a tenth of the time or less.
    k: replaces the recipe's base K. recipe: a built-in name or a TOML file; "dense" stores everything unchanged.
    size, bpw: instead of k and recipe, the maximum bytes of the whole file or bits of a clustered weight. K is then
    chosen for each matrix for the least loss (`rkf.cluster.allocation`). The loss is measured on the calibration text
    if there is one; a dry run uses typical losses. archive: the limits apply to the file packed by `rkf pack`, and K to
    ranks of the least entropy. cpu: choose only K that CPUs of this level multiply fastest (`allocation.FASTEST`).
    workers: threads, by default one per usable core; the bytes do not depend on it. ray: the address of a Ray cluster,
    whose machines cluster the matrices (`rkf.converters.ray_tasks`); workers is then the number of tasks at once.
    force: overwrite `out`.
    resume: continue an interrupted conversion of the same job from its work folder beside `out`, and keep the folder if
    this one fails too. dry_run: predict the ledger and write nothing. part_bytes: write `out` as the index of a model
    in parts, each with at most so many bytes before its directory (`rkf.file.split`). progress: called after each
    tensor, in the caller's thread; None shows a bar on stderr if that is a terminal.

    `out` is complete or absent (or unchanged), no matter when the process is killed. Raises UsageError, SourceError,
    UnsupportedError, OutputError.
    """
    out = Path(out)
    if k is not None and not MIN_K <= k <= MAX_K:
        raise UsageError(f"k: expected {MIN_K} to {MAX_K}, got {k}")
    if sum(given is not None for given in (size, bpw, k or recipe)) > 1:
        raise UsageError("size, bpw, and a recipe with its k exclude each other: give one")
    if archive and size is None and bpw is None:
        raise UsageError("archive: expected size or bpw with it")
    if cpu is not None and cpu not in allocation.FASTEST:
        raise UsageError(f"cpu: expected one of {', '.join(allocation.FASTEST)}, got {cpu}")
    if cpu is not None and (archive or (size is None and bpw is None)):
        raise UsageError("cpu: expected size or bpw with it, without archive")
    if part_bytes is not None:
        check_part_bytes(part_bytes)
    if workers is not None and workers < 1:
        raise UsageError(f"workers: expected at least 1, got {workers}")
    src = locate(src)
    plain: Source = open_source(src)
    if adapter is not None:
        plain = AdaptedSource(plain, Adapter(Path(adapter)))
    source = plain
    budgeted = size is not None or bpw is not None
    head = stored_head(plain)
    first = None if budgeted else Recipe.load(recipe or "default", plain.model.program, k, head)
    rotates = first is None or first.rotates
    if calibrate and rotates and not _is_exact(plain, first):
        source = RotatedSource(plain)
    if calibrate and not rotates and not compensate:
        raise UsageError(f"recipe {recipe}: it rotates nothing, so there is nothing to scale: expected compensate")
    announced = calibrate.announced(plain) if calibrate else None

    def plan(losses: Mapping[str, float] | None) -> Recipe:
        if not budgeted:
            return Recipe.load(recipe or "default", source.model.program, k, head)
        fit = archived if archive else partial(fitting, cpu=cpu)
        return fit(source, lambda trial: job(source, trial, announced).rehearse(), size, bpw, losses)

    def job(source: Source, chosen: Recipe, text: Mapping[str, Any] | None) -> _Job:
        return _Job(source, chosen, out, text, compensate, part_bytes)

    expected = plan(None)
    if not any(expected.rule(name, spec.shape).k for name, spec in source.tensors.items()):
        calibrate = announced = None  # there is nothing to calibrate
    if dry_run:
        return job(source, expected, announced).rehearse()
    refuse_existing(out, force)
    refuse_inputs(out, src, source, recipe=recipe, adapter=adapter, calibrate=calibrate)
    with ExitStack() as stack:
        machines = stack.enter_context(_machines(ray)) if ray else None
        report = progress or stack.enter_context(bar(f"converting {source.label}"))
        calibration = calibrate(plain, out.parent) if calibrate else None
        text = calibration.provenance if calibration else None
        if calibration and not compensate:
            source = plain if source is plain else RotatedSource(plain, _mean_squares(calibration))
            calibration = None
        calibration = calibration and calibration.of(source)
        chosen = plan(calibration.losses(allocation.coarse)) if calibration and budgeted else expected
        at_once = workers or (machines.cpus if machines else codec.workers())
        return job(source, chosen, text).run(at_once, force, resume, report, calibration, machines)


def refuse_inputs(
    out: Path,
    src: Path,
    source: Source,
    *,
    recipe: str | Path | None = None,
    adapter: str | Path | None = None,
    calibrate: Calibrator | None = None,
) -> None:
    """Raise OutputError if `out` is a file that a conversion with these arguments reads."""
    refuse_source(out, src, source)
    if adapter is not None:
        refuse_same_file(out, Path(adapter, CONFIG), Path(adapter, WEIGHTS))
    refuse_same_file(out, recipe if recipe and Path(recipe).is_file() else None, calibrate.text if calibrate else None)


def _machines(address: str) -> AbstractContextManager[RayMachines]:
    from rkf.converters.ray_tasks import ray_machines  # needs the extra `ray`

    return ray_machines(address)


def _is_exact(source: Source, recipe: Recipe | None) -> bool:
    """Whether clustering loses nothing of the layers, because no matrix has more distinct values than centroids (of a
    budget: the most that there can be). Rotation would mix them. Reads one matrix of any other model.
    """
    ends = {name for op in (*source.model.program.stem, *source.model.program.top) for name in op.tensor_names()}
    for name in clusterable(source.model.program):
        if name in source.tensors and name not in ends:
            k = MAX_K if recipe is None else recipe.rule(name, source.tensors[name].shape).k
            if k is None or few_distinct(source.read(name).decode(), k) is None:
                return False
    return True


def _mean_squares(calibration: GivenCalibration) -> dict[str, NDArray[np.float32]]:
    """Those of the inputs of matrices, [cols] by name; an expert's are not among them."""
    return {
        name: np.diagonal(each).copy()
        for found in calibration.moments()
        for name, each in found.items()
        if isinstance(each, np.ndarray)
    }


def _ahead(items: Iterator[_T]) -> Iterator[_T]:
    """The items, each prepared while the one before is in use: moments of a layer while the last one is clustered."""
    with WorkerThreads(1, "rkf-ahead") as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item


class _Job:
    """One source, one recipe, one output."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        out: Path,
        text: Mapping[str, Any] | None,
        compensate: bool = True,
        part_bytes: int | None = None,
    ) -> None:
        self.source, self.recipe, self.out, self.part_bytes = source, recipe, out, part_bytes
        self.text: Any = "none"  # the calibration text, and whether it chose the indices
        if text:
            self.text = dict(text) if compensate else {**text, "use": "scales"}
        self.compensated = bool(text) and compensate
        self.names = sorted([*source.tensors, *source.aliases])
        head = stored_head(source)
        self.by_token = {head, *allocation.lone_embeddings(source.model.program, head)}  # a row for each token
        self.frequent: NDArray[np.int64] | None = None  # all tokens, if a text tells; the first ones' rows stay exact
        self.numbers = {name: number for number, name in enumerate(self.names)}  # of parts in the work folder
        self.work = WorkFolder(out)
        self.each: Callable[..., Iterable[Any]] = map  # applies a function to the experts of a stack
        self.cluster_alike: Callable[..., list[Clustered]] = cluster_alike
        self.in_flight = max(_IN_FLIGHT, *(spec.weights for spec in source.tensors.values()))

    def rehearse(self) -> Ledger:
        with Rehearsal(self.out, metadata=self._metadata(), provenance=self._provenance()) as writer:
            rows = self._write(writer, ((name, self._blank(name)) for name in self.names))
        return Ledger(tuple(rows), writer.file_bytes, self.source.left_out, self.source.notes)

    def run(
        self,
        workers: int,
        force: bool,
        resume: bool,
        report: Progress,
        calibration: GivenCalibration | None,
        machines: RayMachines | None,
    ) -> Ledger:
        if machines:
            self.cluster_alike = machines.cluster_alike
            self.in_flight *= machines.machines  # each holds as much as one process would
        writer = Writer(
            self.out,
            metadata=self._metadata(),
            provenance=self._provenance(),
            force=force,
            part_bytes=self.part_bytes,
        )
        try:
            # The results are closed first, which waits for their threads: no tensor may come into the work folder after
            # it was removed. The writer's lock also covers that folder.
            with writer, WorkerThreads(workers, "rkf-experts") as experts, closing(self._results(workers)) as results:
                self.each = experts.map
                self.work.open(self._fingerprint(), resume)
                self.frequent = calibration.frequent if calibration else None
                suited = self._suit(calibration, workers, report) if calibration else set()
                rows = self._write(writer, self._reported(results, report, suited))
        except BaseException:
            self.work.close(keep=resume)
            raise
        self.work.close()
        notes = self.source.notes + (calibration.notes if calibration else ())
        return Ledger(tuple(rows), total_bytes(self.out), self.source.left_out, notes)

    def _write(self, writer: Writer, results: Iterator[tuple[str, _Result]]) -> list[LedgerRow]:
        rows = []
        for name, (tensor, stats) in results:
            writer.add(name, tensor, stats)
            spec = self.source.tensors[self.source.aliases.get(name, name)]
            rows.append(row(name, spec, tensor, stats))
        blobs = {**self.source.verbatim, TOKENIZER: self.source.tokenizer_json}
        if self.source.chat_template:
            blobs[CHAT_TEMPLATE] = self.source.chat_template.encode()
        for name in sorted(blobs):
            writer.blob(name, blobs[name])
        self.source.refuse_changed()
        return rows

    def _results(self, workers: int) -> Generator[tuple[str, _Result], None, None]:
        """Every tensor, in name order. While one is consumed, later ones are computed, as many as memory allows."""
        specs = self.source.tensors
        waiting: deque[tuple[str, int, Future[_Result]]] = deque()
        in_flight = 0
        with WorkerThreads(workers, "rkf-convert") as pool:
            for name in self.names:
                weights = specs[name].weights if name in specs else 0
                while waiting and in_flight + weights > self.in_flight:
                    done, freed, future = waiting.popleft()
                    yield done, future.result()
                    in_flight -= freed
                in_flight += weights
                waiting.append((name, weights, pool.submit(self._stored, name)))
            while waiting:
                done, _, future = waiting.popleft()
                yield done, future.result()

    def _suit(self, calibration: GivenCalibration, workers: int, report: Progress) -> set[str]:
        """Cluster the tensors that have moments into the work folder, layer by layer. Returns their names."""
        suited: set[str] = set()
        with threadpool_limits(1, "blas"), WorkerThreads(workers, "rkf-suit") as pool:
            for moments in _ahead(calibration.metrics()):
                named = {self.source.aliases.get(name, name): each for name, each in moments.items()}
                wanted = {id(each): pool.submit(objectives, each) for each in named.values()}
                jobs = []
                for key, making in wanted.items():
                    objective = making.result()
                    alike = [name for name, each in named.items() if id(each) == key]
                    for names in [alike] if callable(objective) else [[name] for name in alike]:
                        jobs.append((names, pool.submit(self._make, names, objective)))
                for names, job in jobs:
                    for name, (_, stats) in zip(names, job.result(), strict=True):
                        suited.add(name)
                        report(Step(name, *self._progress(suited), stats.get("relative_error")))
        return suited

    def _stored(self, name: str) -> _Result:
        """One tensor in its stored form."""
        return (Alias(self.source.aliases[name]), {}) if name in self.source.aliases else self._make([name])[0]

    def _make(self, names: Sequence[str], objective: Objectives | None = None) -> list[_Result]:
        """Tensors in their stored form: from the work folder if present, otherwise read and clustered. Several of them
        are stacks that read the same inputs.
        """
        parts = {name: self.work.load(self.numbers[name], name) for name in names}
        found: dict[str, _Result] = {name: (part[0], dict(part[1])) for name, part in parts.items() if part is not None}
        missing = [name for name in names if name not in found]
        rules = [self.recipe.rule(name, self.source.tensors[name].shape) for name in missing]
        kept = None
        if self.frequent is not None and self.by_token.issuperset(missing):
            kept = self.frequent[: max((rule.rows_kept(len(self.frequent)) for rule in rules), default=0)]
        with naming(Path(self.source.label)):
            tensors = [(self.source.read(name), rule, name) for name, rule in zip(missing, rules, strict=True)]
            self.source.refuse_changed()  # before it is kept for a later run
            found |= zip(missing, self.cluster_alike(tensors, objective, kept, self.each), strict=True)
        for name in missing:
            tensor, stats = found[name]
            if isinstance(tensor, ClusteredMatrix):
                self.work.save(self.numbers[name], name, tensor, stats)
        return [found[name] for name in names]

    def _reported(
        self, results: Iterator[tuple[str, _Result]], report: Progress, reported: set[str]
    ) -> Iterator[tuple[str, _Result]]:
        """The results; each is reported unless it already was."""
        for name, result in results:
            yield name, result
            if name not in reported:
                reported.add(name)
                report(Step(name, *self._progress(reported), result[1].get("relative_error")))

    def _progress(self, done: set[str]) -> tuple[int, int]:
        """Weights done, weights in all."""
        specs = self.source.tensors
        return sum(specs[name].weights for name in done & specs.keys()), sum(spec.weights for spec in specs.values())

    def _blank(self, name: str) -> _Result:
        if name in self.source.aliases:
            return Alias(self.source.aliases[name]), {}
        spec = self.source.tensors[name]
        rule = self.recipe.rule(name, spec.shape)
        rows = rule.rows_kept(spec.shape[0]) if name in self.by_token and self.compensated else 0
        tensor = blank(spec, rule, rows)
        stats = {"relative_error": 0.0, "entropy_bits": 0.0} if isinstance(tensor, ClusteredMatrix) else {}
        return tensor, stats

    def _metadata(self) -> dict[str, Any]:
        return {"model": self.source.model.to_metadata()}

    def _provenance(self) -> dict[str, Any]:
        recipe: dict[str, Any] = {"name": self.recipe.name, "text": self.recipe.text}
        if self.recipe.k is not None:
            recipe["k"] = self.recipe.k
        left_out = {"left_out": list(self.source.left_out)} if self.source.left_out else {}
        return {
            "calibration": self.text,
            "recipe": recipe,
            "rkf": __version__,
            "source": {"files": dict(self.source.files), "label": self.source.label, **left_out},
        }

    def _fingerprint(self) -> dict[str, str]:
        """The values that must be equal for one conversion to resume another."""
        return {
            "libraries": f"numpy {np.__version__}, numba {numba.__version__}",
            "calibration": repr(self.text),
            "recipe": repr(self._provenance()["recipe"]),
            "rkf": __version__,
            "source": self.source.fingerprint,
        }
