"""The interface of a calibration to the pipeline. Knows no runtime: `rkf.calibrate.calibration` passes one in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rkf.cluster.compensate import Moments
from rkf.converters.source import Source
from rkf.format.matrix import F32

Coarse = Callable[[F32, "Moments | None"], F32]
"""Weights as a coarse file would store them. If the second moments of their inputs are given, fitted to those."""


class GivenCalibration(Protocol):
    """A calibration on one text for one source."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user about how the text came about."""
        ...

    def of(self, source: Source) -> GivenCalibration:
        """The same text for another form of the same model."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The file's record of it: the same text gives the same bytes."""
        ...

    def moments(self) -> Iterator[Mapping[str, Moments]]:
        """Second moments of the inputs of matrices and stacks by name, one layer at a time."""
        ...

    def metrics(self) -> Iterator[Mapping[str, Moments]]:
        """What errors of the rows of matrices, stacks and embeddings are weighed with, by name, one layer at a time."""
        ...

    def losses(self, coarse: Coarse) -> Mapping[str, float]:
        """The loss of the model's predictions when one matrix alone is stored coarsely, by name."""
        ...

    @property
    def frequent(self) -> NDArray[np.int64]:
        """All tokens, the most frequent first."""
        ...


class Calibrator(Protocol):
    """Makes the calibration of a source; may take minutes."""

    @property
    def text(self) -> Path | None:
        """The file that it reads, if any."""
        ...

    def announced(self, source: Source) -> Mapping[str, Any]:
        """A provenance of the same length as the final one, for a dry run."""
        ...

    def __call__(self, source: Source, folder: Path | None = None) -> GivenCalibration:
        """folder: for temporary files, which may grow as large as the source."""
        ...
