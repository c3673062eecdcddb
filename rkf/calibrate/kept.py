"""A calibration as a file: the tokens of a text and the loss of every matrix on them, with a hash. Knows no source.

The arrays of a zip (numpy's npz, no pickles): `tokens`, `names` and `losses` of matrices (none if they are not measured
yet), and `hash`, BLAKE3 of the others.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from rkf._version import __version__
from rkf.errors import OutputError
from rkf.file.arrays import read_arrays
from rkf.file.atomic import replacing
from rkf.format.canonical import encode

U32 = NDArray[np.uint32]

_EDITION = 1  # of texts and losses; to be raised when those of a source change
MAGIC = b"PK"  # first bytes of the file
_ARRAYS = {"tokens": ("u4", 2), "names": ("U", 1), "losses": ("f8", 1), "hash": ("u1", 1)}  # dtype, number of axes


def save(path: Path, tokens: U32, losses: Mapping[str, float], force: bool = False) -> None:
    """Write a calibration. tokens: u32[sequences, ctx]; losses: by the matrices' names."""
    names = sorted(losses)
    values = np.array([losses[name] for name in names], np.float64)
    arrays: dict[str, NDArray[Any]] = {"tokens": tokens, "names": np.array(names, np.str_), "losses": values}
    packed = io.BytesIO()
    np.savez(packed, tokens=tokens, names=arrays["names"], losses=values, hash=_hash(arrays))
    with replacing(path, force) as output:
        output.write(packed.getbuffer())


def parse(data: bytes) -> tuple[U32, dict[str, float]]:
    """(Tokens, losses) of a file's bytes. Raises ValueError, in one line, for what `save` did not write."""
    arrays = read_arrays(data, _ARRAYS)
    given = arrays.pop("hash")
    if not np.array_equal(given, _hash(arrays)):
        raise ValueError("damaged: its hash differs")
    tokens, names, losses = arrays["tokens"], arrays["names"].tolist(), arrays["losses"].tolist()
    if not tokens.size or len(names) != len(losses) or len(set(names)) != len(names):
        raise ValueError(f"damaged: tokens of shape {tokens.shape}, {len(losses)} losses of {len(set(names))} matrices")
    if not all(math.isfinite(loss) and loss >= 0 for loss in losses):
        raise ValueError("damaged: expected finite losses that are not negative")
    return tokens, dict(zip(names, losses, strict=True))


def place(folder: Path, source: str, text: Mapping[str, Any]) -> Path:
    """Where a calibration is kept. source: fingerprint of the weights; text: what decides the tokens."""
    return folder / f"{blake3(encode([__version__, _EDITION, source, text])).hexdigest()[:32]}.npz"


def found(path: Path) -> tuple[U32, dict[str, float]] | None:
    """(Tokens, losses) kept at a place; None if nothing, or something damaged, is there."""
    with suppress(OSError, ValueError):
        return parse(path.read_bytes())
    return None


def keep(path: Path, tokens: U32, losses: Mapping[str, float]) -> None:
    """Keep a calibration at a place; if that cannot be written, it is made again next time."""
    with suppress(OSError, OutputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, tokens, losses, force=True)


def _hash(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """u8[32] over the names, dtypes, shapes and bytes of arrays."""
    digest = blake3()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}\n".encode())
        digest.update(arrays[name].tobytes())
    return np.frombuffer(digest.digest(), np.uint8)
