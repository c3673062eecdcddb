"""Checks made once at load: hashes, zero padding, and the small arrays. Knows nothing of ranks beyond their hash.

Problems of arrays are returned as text, so that the reader, the writer and `verify` can each raise their own error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from rkf.errors import IntegrityError
from rkf.format.fields import REMEDY
from rkf.format.matrix import MatrixValues, to_f32

# A section below this size is hashed by one thread: starting more costs more than they save.
_PARALLEL_BYTES = 1 << 20


def check_hash(data: Any, expected: bytes, where: str) -> None:
    """Raise IntegrityError unless the BLAKE3-256 of `data` is the expected one."""
    threads = blake3.AUTO if len(data) > _PARALLEL_BYTES else 1
    got = blake3(data, max_threads=threads).digest()
    if got != expected:
        raise IntegrityError(f"{where}: expected hash {expected.hex()[:16]}…, got {got.hex()[:16]}…; {REMEDY}")


def check_padding(view: memoryview, extents: Iterable[tuple[int, int]], end: int, where: str) -> None:
    """Raise IntegrityError unless every byte between the extents (start, stop), and up to `end`, is zero."""
    previous = 0
    for start, stop in (*extents, (end, end)):
        if start > previous and bytes(view[previous:start]).strip(b"\0"):
            raise IntegrityError(f"{where}, padding from byte {previous} to {start}: expected zeros; {REMEDY}")
        previous = stop


def values_problem(values: MatrixValues, ascending: bool) -> str | None:
    """The fault of centroids (not finite, or not strictly ascending unless declared unordered), a, b or exceptions."""
    centroids = values.centroids
    if not np.isfinite(centroids).all():
        return "centroids: expected finite values"
    rising = (centroids[:, 1:] > centroids[:, :-1]).all(axis=1)
    if ascending and not rising.all():
        return f"centroids of table {int(np.argmin(rising))}: expected strictly ascending values"
    a, b = (None, None) if values.affine is None else (values.affine.a, values.affine.b)
    if a is not None and not (np.isfinite(a) & (a > 0)).all():
        return "affine a: expected finite values above 0"
    if b is not None and not np.isfinite(b).all():
        return "affine b: expected finite values"
    if values.exceptions is None or values.exceptions_dtype is None:
        return None
    finite = np.isfinite(to_f32(values.exceptions, values.exceptions_dtype)).all()
    return None if finite else "exception values: expected finite values"


def positions_problem(positions: NDArray[Any], weights: int) -> str | None:
    """The fault of exception positions, which must ascend strictly and stay below the number of weights."""
    if not (positions[1:] > positions[:-1]).all():
        return "exception positions: expected ascending values, each once"
    if int(positions[-1]) >= weights:
        return f"exception positions: expected values below {weights}, got {int(positions[-1])}"
    return None
