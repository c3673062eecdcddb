"""`tune`: from a model, its reference and a text to a values file. Joins text, loop, checkpoint and file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from rkf.calibrate.calibration import prompts
from rkf.errors import UsageError
from rkf.file.atomic import refuse_existing
from rkf.file.container import Container, open_file, refuse_input
from rkf.file.fingerprint import fingerprint
from rkf.file.values import write_values
from rkf.format.constants import TOKENIZER
from rkf.model.metadata import ModelMetadata
from rkf.runtime.torch_model import Decoder
from rkf.text.reading import read_text
from rkf.text.tokenizer import open_tokenizer
from rkf.tune import learning_text
from rkf.tune.checkpoint import Checkpoint
from rkf.tune.live import LiveValues
from rkf.tune.loop import Learner, Lesson, hidden_states

SEQUENCES, TOKENS = 64, 512
Progress = Callable[[str, int, int], None]  # the current task, the amount done, the amount in all


def tune(
    model: str | PathLike[str],
    reference: str | PathLike[str],
    out: str | PathLike[str],
    *,
    data: str | PathLike[str] = "self",
    minutes: float = 30.0,
    rows: bool = False,
    device: str | None = None,
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Train centroids and affine factors of `model` towards the predictions of `reference`; write them to a values
    file.

    reference: an rkf file of the same model, dense. data: "self" for text that the reference generates, otherwise a
    UTF-8 file. minutes: of training; the text and the reference's pass over it come before. rows: train factors a and b
    for every row, not one a for every matrix. device: torch's name, by default a GPU if there is one. resume: resume an
    interrupted run. Held-out text measures the recovered share of the divergence; the best values found are written, at
    worst the old ones.

    Returns {"steps", "kld_before", "kld", "recovered", "parameters"}, in nats per token. Raises UsageError: the two
    models do not match, the text is too short, the output exists.
    """
    out = Path(out)
    refuse_existing(out, force)
    refuse_input(out, model, reference, None if data == "self" else data)
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with open_file(model) as container, open_file(reference) as source:
        metadata = _fitting(container, source)
        words = None if data == "self" else open_tokenizer(source).encode(read_text(Path(data)))
        lesson_hash = fingerprint([source], [seed, words or "self"])
        checkpoint = Checkpoint(out, lesson_hash, fingerprint([container], [lesson_hash, rows]), resume)
        lesson = _lesson(source, metadata, checkpoint, words, on, seed, progress)
        decoder = Decoder.of(container).to(on).requires_grad_(False)
        live = {name: LiveValues(weight, container.counts(name), rows) for name, weight in decoder.clustered().items()}
        learner = Learner(decoder, live, *lesson.split(max(len(lesson.ids) // 16, 1)))
        spent = checkpoint.restore(learner)
        if spent is None:
            learner.begin()
            spent = 0.0

        def after_step(learner: Learner, spent: float) -> None:
            checkpoint.save(learner, spent)
            progress(f"tune, {learner.recovered:.0%} recovered", int(spent), int(minutes * 60))

        learner.learn(minutes * 60, spent, after_step)
        report = {
            "steps": learner.step,
            "kld_before": learner.before,
            "kld": learner.best,
            "recovered": learner.recovered,
            "parameters": sum(parameter.numel() for parameter in learner.parameters()),
        }
        values = {name: item.to_matrix(container.values(name)) for name, item in live.items()}
        write_values(out, container, values, provenance={"tuned": report}, force=force)
    checkpoint.remove()
    return report


def _fitting(container: Container, source: Container) -> ModelMetadata:
    """What the model's file says of it. Both files must be of the same model."""
    if container.model is None or source.model is None:
        raise UsageError(f"{container.path}, {source.path}: expected two whole models")
    if not any(entry.kind == "clustered" for entry in container.tensors.values()):
        raise UsageError(f"{container.path}: has no clustered tensor, so there is nothing to tune")
    if any(entry.kind == "clustered" for entry in source.tensors.values()):
        raise UsageError(f"{source.path}: has clustered tensors: expected `rkf convert SRC OUT --recipe dense`")
    if not container.model.computes_as(source.model) or container.blob(TOKENIZER) != source.blob(TOKENIZER):
        raise UsageError(f"{source.path}: another model than {container.path}: expected the one it was converted from")
    return container.model


def _lesson(
    source: Container,
    metadata: ModelMetadata,
    checkpoint: Checkpoint,
    words: list[int] | None,
    device: torch.device,
    seed: int,
    progress: Progress,
) -> Lesson:
    """The text and the reference's outputs on it, from the checkpoint if present; keeps only the reference's head."""
    teacher = Decoder.of(source).to(device).requires_grad_(False)
    width = metadata.program.widths()[metadata.program.logits.src]
    found = checkpoint.lesson(metadata.vocab_size, width) if isinstance(width, int) else None
    if found is None:
        tokens = min(TOKENS, metadata.context_length)
        if words is None:
            beginnings, _ = prompts(metadata, open_tokenizer(source))
            found = learning_text.written(teacher, beginnings, SEQUENCES, tokens, seed, partial(progress, "text"))
        else:
            ids = learning_text.cut(words, SEQUENCES, tokens).to(device)
            found = ids, hidden_states(teacher, ids, partial(progress, "reference"))
        checkpoint.save_lesson(*found)
    ids, hidden = (part.to(device) for part in found)
    return Lesson(ids, hidden, teacher.head)
