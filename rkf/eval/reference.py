"""A reference stored as a `.kld` file: the tokens of every window and its predictions, 196 bytes a scored token.

It is a file of kept arrays (`rkf.file.arrays`): `tokens: u32[windows, ctx]`, `ids` and `log_p` of
`distributions.Sampled` over all windows, `target: f32[scored]` (log p of the actual token), `noise: f64[windows]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.errors import CorruptError
from rkf.eval.distributions import DRAWS, F32, TOP, Distribution, Sampled
from rkf.file.arrays import packed_arrays, read_arrays
from rkf.file.atomic import replacing
from rkf.text.reading import open_regular, read_bytes

_KIND = "reference 1"
_ARRAYS = {"tokens": ("u4", 2), "ids": ("u4", 2), "log_p": ("f4", 2), "target": ("f4", 1), "noise": ("f8", 1)}


@dataclass(frozen=True, slots=True)
class Window:
    """One window of a reference. ids: i64[ctx]; the second half is scored.

    target: f32[scored], log p of the actual tokens; noise: the mean of KL(p || p from its logits in bf16).
    """

    ids: NDArray[np.int64]
    distribution: Distribution
    target: F32
    noise: float


def write(path: Path, windows: list[Window], force: bool = False) -> None:
    """Write windows whose distributions are samples."""
    samples = [window.distribution for window in windows]
    arrays = {
        "tokens": np.stack([window.ids for window in windows]).astype(np.uint32),
        "ids": np.concatenate([sample.ids for sample in samples if isinstance(sample, Sampled)]),
        "log_p": np.concatenate([sample.log_p for sample in samples if isinstance(sample, Sampled)]),
        "target": np.concatenate([window.target for window in windows]),
        "noise": np.array([window.noise for window in windows]),
    }
    with replacing(path, force) as output:
        output.write(packed_arrays(_KIND, arrays))


def read(path: Path) -> list[Window]:
    """The windows of a file. Raises CorruptError if it is not a `.kld` file."""
    try:
        with open_regular(path) as file:
            return list(_windows(read_arrays(read_bytes(file, str(path)), _KIND, _ARRAYS)))
    except ValueError as error:
        raise CorruptError(f"{path}: not a reference written by `rkf eval kld --save`: {error}") from error


def _windows(arrays: Mapping[str, NDArray[Any]]) -> Iterator[Window]:
    tokens, ids, log_p = arrays["tokens"].astype(np.int64), arrays["ids"], arrays["log_p"]
    target, noise = arrays["target"], arrays["noise"]
    if tokens.size == 0 or tokens.shape[1] < 4:
        raise ValueError(f"expected windows of tokens, got {tokens.shape}")
    scored = tokens.shape[1] - tokens.shape[1] // 2 - 1
    total = scored * len(tokens)
    if ids.shape != (total, TOP + DRAWS) or log_p.shape != ids.shape or target.shape != (total,):
        raise ValueError(f"expected {total} scored tokens, got arrays of shape {ids.shape}, {target.shape}")
    if noise.shape != (len(tokens),) or not all(np.isfinite(each).all() for each in (log_p, target, noise)):
        raise ValueError("expected finite probabilities, and the noise of each window")
    for number, window in enumerate(tokens):
        part = slice(number * scored, (number + 1) * scored)
        yield Window(window, Sampled(ids[part], log_p[part]), target[part], float(noise[number]))
