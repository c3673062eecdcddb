"""A calibration as a file: the tokens of a text and the loss of every matrix on them. Knows no source.

It is a file of kept arrays (`rkf.file.arrays`): `tokens`; `names` and `losses` of matrices, none if they are not
measured yet; `source`, which model it is of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from rkf._version import __version__
from rkf.errors import OutputError
from rkf.file.arrays import MOST, packed_arrays, read_arrays
from rkf.file.atomic import replacing
from rkf.file.private import private_folder, read_private
from rkf.format.canonical import encode

U32 = NDArray[np.uint32]

_EDITION = 3  # of how texts and losses are made; to be raised when the same inputs give others
KIND = "calibration 2"
_ARRAYS = {"tokens": ("u4", 2), "names": ("U", 1), "losses": ("f8", 1), "source": ("U", 1)}  # dtype, number of axes


@dataclass(frozen=True, slots=True)
class KeptCalibration:
    """tokens: u32[sequences, ctx]; losses: by the matrices' names; weights, tokenizer: hashes of the source's files and
    of its tokenizer.json.
    """

    tokens: U32
    losses: Mapping[str, float]
    weights: str
    tokenizer: str


def save(path: Path, kept: KeptCalibration, force: bool = False, private: bool = False) -> None:
    """Write a calibration."""
    names = sorted(kept.losses)
    arrays = {
        "tokens": kept.tokens.astype(np.uint32),
        "names": np.array(names, np.str_),
        "losses": np.array([kept.losses[name] for name in names], np.float64),
        "source": np.array([kept.weights, kept.tokenizer]),
    }
    with replacing(path, force, private) as output:
        output.write(packed_arrays(KIND, arrays))


def parse(data: bytes) -> KeptCalibration:
    """The calibration of a file's bytes. Raises ValueError, in one line, for what `save` did not write."""
    arrays = read_arrays(data, KIND, _ARRAYS)
    tokens, names, losses, source = arrays["tokens"], *(arrays[key].tolist() for key in ("names", "losses", "source"))
    if not tokens.size or len(names) != len(losses) or len(set(names)) != len(names):
        raise ValueError(f"damaged: tokens of shape {tokens.shape}, {len(losses)} losses of {len(set(names))} matrices")
    if not all(math.isfinite(loss) and loss >= 0 for loss in losses):
        raise ValueError("damaged: expected finite losses that are not negative")
    if len(source) != 2:
        raise ValueError(f"damaged: expected the hashes of weights and tokenizer, got {len(source)} texts")
    return KeptCalibration(tokens, dict(zip(names, losses, strict=True)), *source)


def place(folder: Path, source: str, text: Mapping[str, Any]) -> Path:
    """Where a calibration is kept. source: fingerprint of the weights; text: what decides the tokens."""
    return folder / f"{blake3(encode([__version__, _EDITION, source, text])).hexdigest()[:32]}.npz"


def found(path: Path) -> KeptCalibration | None:
    """The calibration kept at a place; None if nothing, or something damaged, is there."""
    with suppress(OutputError, ValueError):
        if path.parent.exists():
            private_folder(path.parent)
            return parse(read_private(path, MOST) or b"")
    return None


def keep(path: Path, kept: KeptCalibration) -> None:
    """Keep a calibration at a place; if that cannot be written, it is made again next time."""
    with suppress(OutputError):
        private_folder(path.parent)
        save(path, kept, force=True, private=True)
