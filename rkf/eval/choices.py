"""Multiple choice: the ending that a model finds most likely after a context. Knows no task, only lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rkf.errors import UsageError, naming
from rkf.eval.perplexity import finite, negative_log_likelihood
from rkf.runtime.backend import Row

if TYPE_CHECKING:
    from rkf.runtime.model import Model

Progress = Callable[[int, int], None]  # (items done, items in all)
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Item:
    """One question. label: the index of the correct ending, from 0."""

    context: str
    endings: tuple[str, ...]
    label: int


def parse(text: str, name: str) -> list[Item]:
    """Items from lines of JSON: {"context": "…", "endings": ["…", "…"], "label": 0}, other keys free.

    Raises UsageError with `name` and the line's number.
    """
    items = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            try:
                items.append(_item(json.loads(line)))
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                expected = "expected context, two endings or more that are not empty, and the label of one"
                raise UsageError(f"{name}: line {number}: {expected}: {error!r}") from error
    if not items:
        raise UsageError(f"{name}: no items; expected lines of JSON")
    return items


def _item(raw: dict[str, object]) -> Item:
    context, endings, label = raw["context"], raw["endings"], raw["label"]
    if not isinstance(context, str) or not context or not isinstance(endings, list) or len(endings) < 2:
        raise ValueError("context or endings")
    if not all(isinstance(ending, str) and ending for ending in endings):
        raise ValueError("endings")
    if type(label) is not int or not 0 <= label < len(endings):
        raise ValueError(f"label {label}")
    return Item(context, tuple(endings), label)


def choices(model: Model, items: Sequence[Item], *, progress: Progress | None = None) -> dict[str, float]:
    """{"accuracy", "accuracy_stderr", "chance" (of guessing), "items"}.

    An ending's score is its log-likelihood after the context, divided by its bytes in UTF-8 (`acc_norm` of EleutherAI's
    lm-evaluation-harness). The highest score is the model's choice; ties go to the first. Context and ending are joined
    unchanged and encoded together, so a space between them belongs to the ending. Raises ContextLengthError, and
    UsageError for a context with no token to predict an ending from.
    """
    right = []
    for done, item in enumerate(items, 1):
        with naming(f"item {done}"):
            scores = _scores(model, item)
        right.append(int(np.argmax(scores)) == item.label)
        if progress is not None:
            progress(done, len(items))
    accuracy = float(np.mean(right))
    return {
        "accuracy": accuracy,
        "accuracy_stderr": sqrt(accuracy * (1 - accuracy) / max(1, len(items) - 1)),
        "chance": float(np.mean([1 / len(item.endings) for item in items])),
        "items": len(items),
    }


def _scores(model: Model, item: Item) -> list[float]:
    """Log-likelihood per byte of each ending. The tokens that all endings share are computed once, what follows
    in passes of many endings.
    """
    enough = model.config.context_length + 1
    rows = [model.tokenizer.encode(item.context + ending, enough=enough) for ending in item.endings]
    alone = model.tokenizer.encode(item.context, enough=enough)
    first = min(_shared(alone, row) for row in rows)  # an ending may change how the context's end is tokenised
    first = min(first, *(len(row) - 1 for row in rows))
    if first < 1:
        raise UsageError("the context merges with an ending into one token; expected a longer context")
    sequence = model.backend.new_sequence(max(map(len, rows)))
    before = model.backend.forward([Row(sequence, np.array(rows[0][:first], np.int64))])
    scores: list[float] = []
    for group in _groups([np.array(row[first:], np.int64) for row in rows], model.backend.pass_tokens):
        read = [Row(sequence.fork(), targets[:-1]) for targets in group if len(targets) > 1]
        after = model.backend.forward(read, "all") if read else before[:0]
        for targets in group:
            own, after = after[: len(targets) - 1], after[len(targets) - 1 :]
            logits = finite(np.concatenate([before, own]))
            scores.append(-float(negative_log_likelihood(logits, targets).sum()))
    return [score / len(ending.encode()) for score, ending in zip(scores, item.endings, strict=True)]


def _groups(endings: Sequence[I64], most: int) -> Iterator[list[I64]]:
    """The endings, as many at a time as have `most` tokens together; one at least."""
    group: list[I64] = []
    for ending in endings:
        if group and sum(map(len, group)) + len(ending) > most:
            yield group
            group = []
        group.append(ending)
    yield group


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of leading ids that two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
