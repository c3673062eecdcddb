"""How the hostile tests read a file: all of it, with the project's reader and with the reference reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import rkf
from rkf.errors import (
    BindingError,
    IntegrityError,
    NotRkfError,
    RkfError,
    SemanticsError,
    StructureError,
    UnsupportedError,
)
from rkf.file.container import Container
from tests.hostile import strict

Weights = dict[str, NDArray[np.float32]]
LEVEL_ERRORS: dict[str, type[RkfError]] = {
    "not-rkf": NotRkfError,
    "unsupported": UnsupportedError,
    "structure": StructureError,
    "integrity": IntegrityError,
    "semantics": SemanticsError,
    "binding": BindingError,
}


def decode_all(container: Container) -> Weights:
    """Every tensor, and every blob once; nothing of a values file, which has no weights of its own."""
    if container.kind != 1:
        return {}
    for name in container.directory.blobs:
        container.blob(name)
    return {name: container.decode(name) for name in container.tensors}


def read_all(path: Path, values: Path | None = None) -> Weights:
    """Open, check and decode everything, as a runtime does."""
    with rkf.open(path, values=values) as container:
        return decode_all(container)


def outcome(path: Path, values: Path | None = None) -> str | Weights:
    """The weights, or the level of the refusal. Only an RkfError is a refusal."""
    try:
        return read_all(path, values)
    except RkfError as error:
        return next(level for level, kind in LEVEL_ERRORS.items() if type(error) is kind)


def reference_outcome(path: Path, values: Path | None = None) -> str | Weights:
    """The same for the strict reference reader."""
    try:
        return strict.read(path, values)
    except strict.Refused as refusal:
        return refusal.args[0]
