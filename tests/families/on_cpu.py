"""Converted models on the CPU: logits that do not depend on how a text is cut into calls, and greedy text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rkf.file.container import open_file
from rkf.model.program import Program
from rkf.runtime.backend import Row
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.engine import Engine, Request
from rkf.runtime.sampling import Sampling, sample

_CUTS = ([1, 2, 9, 40, 41, 75], None)  # chunks that end within windows and beyond, and token by token
_SAMPLING = Sampling(repetition_penalty=1.5)  # greedy; without it, many random models repeat one token


def logits_on_cpu(path: Path, ids: list[int], *, exact: bool, cache_format: str | None = None) -> NDArray[np.float32]:
    """f32[tokens, vocab], with the same bits from the whole text, from chunks and token by token."""
    with open_file(path) as container:
        backend = CpuBackend(container, exact=exact, threads=1, cache_format=cache_format)
        tokens, program = np.array(ids), backend.metadata.program
        whole = backend.forward([Row(backend.new_sequence(len(ids)), tokens)], "all")
        for cuts in _CUTS:
            sequence = backend.new_sequence(len(ids))
            parts = np.split(tokens, cuts or range(1, len(ids)))
            found = np.concatenate([backend.forward([Row(sequence, part)], "all") for part in parts])
            np.testing.assert_array_equal(found[settled(program, len(ids)) :], whole[settled(program, len(ids)) :])
    return whole


def settled(program: Program, tokens: int) -> int:
    """The position from which a text of any cut has the ropes of the whole one."""
    contexts = [rope.original_context or 0 for rope in program.ropes if rope.long is not None]
    return max((context for context in contexts if context < tokens), default=0)


def assert_same_text(path: Path, model: Any, prompt: list[int], tokens: int) -> None:
    """Greedy text of a file, in f32, is that of its source by transformers."""
    wanted = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=tokens,
        do_sample=False,
        repetition_penalty=_SAMPLING.repetition_penalty,
        eos_token_id=None,
    )
    seen: list[NDArray[np.float32]] = []

    def choose(logits: NDArray[np.float32], ids: Sequence[int]) -> int:
        seen.append(logits.copy())
        return sample(logits, _SAMPLING, ids)

    with open_file(path) as container:
        backend = CpuBackend(container, exact=True, threads=1)
        engine, request = Engine(backend), Request(list(prompt), choose, most=len(prompt) + tokens)
        engine.submit(request)
        while not request.ended:
            engine.step()
            request.take()
        text, sequence = request.ids, backend.new_sequence(len(prompt) + tokens)
        parts = np.split(np.array(text[:-1]), range(len(prompt), len(text) - 1))
        alone = [backend.forward([Row(sequence, part)])[0] for part in parts]
        np.testing.assert_array_equal(np.array(alone), np.array(seen))
    assert text == wanted[0].tolist()
