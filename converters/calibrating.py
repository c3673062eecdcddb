"""What the pipeline needs of a calibration. Knows no runtime: `rkf.calibrate.calibration` hands one in."""

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
"""Weights as they would be stored coarsely; given the second moments of their inputs, so as to suit those."""


class GivenCalibration(Protocol):
    """A calibration text for one source."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the file says of it: the same text, the same bytes."""
        ...

    def moments(self) -> Iterator[Mapping[str, Moments]]:
        """Second moments of the inputs of matrices and stacks by name, a layer at a time."""
        ...

    def losses(self, coarse: Coarse) -> Mapping[str, float]:
        """What each matrix costs the model's predictions when it alone is stored coarsely, by name."""
        ...

    @property
    def frequent(self) -> NDArray[np.int64]:
        """All tokens, the most frequent first."""
        ...


class Calibrator(Protocol):
    """Makes the calibration of a source; may take minutes."""

    @property
    def announced(self) -> Mapping[str, Any]:
        """A provenance of the same length as the one to come, for a dry run."""
        ...

    def __call__(self, source: Source, folder: Path | None = None) -> GivenCalibration:
        """folder: for temporary files, which may become as large as the source."""
        ...
