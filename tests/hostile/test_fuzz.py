"""Random damage with recomputed hashes: both readers refuse it at the same level, or read the same weights."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rkf.errors import SemanticsError
from rkf.file.verify import verify
from tests.hostile.mutations import damaged, damaged_program
from tests.hostile.reading import Weights, outcome, reference_outcome
from tests.spec.document import VECTORS

SEEDS = given(seed=st.integers(0, (1 << 64) - 1))
SETTINGS = settings(
    max_examples=250,
    phases=[Phase.generate],  # a smaller seed does not make a simpler file
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("name", ("everything.rkf", "zstd.rkf", "free.rkf"))
@SEEDS
@SETTINGS
def test_models(name: str, seed: int, tmp_path: Path) -> None:
    path = tmp_path / "damaged.rkf"
    path.write_bytes(damaged((VECTORS / name).read_bytes(), random.Random(seed).randrange))
    if agree(outcome(path), reference_outcome(path)):
        with suppress(SemanticsError):
            verify(path)


@pytest.mark.parametrize("name", ("experts", "plain", "recurrent", "scan", "windows"))
@SEEDS
@settings(SETTINGS, max_examples=60)
def test_programs(name: str, seed: int, tmp_path: Path) -> None:
    """Programs with damage in them are refused by both readers, or by none."""
    path = tmp_path / "damaged.rkf"
    path.write_bytes(damaged_program((VECTORS / f"program-{name}.rkf").read_bytes(), random.Random(seed).randrange))
    agree(outcome(path), reference_outcome(path))


@SEEDS
@SETTINGS
def test_values(seed: int, tmp_path: Path) -> None:
    model, path = VECTORS / "everything.rkf", tmp_path / "damaged.rkv"
    path.write_bytes(damaged((VECTORS / "regrouped.rkv").read_bytes(), random.Random(seed).randrange))
    if path.read_bytes()[12] == 2:  # otherwise it is not read as a values file
        agree(outcome(model, path), reference_outcome(model, path))


def agree(ours: str | Weights, theirs: str | Weights) -> bool:
    """Whether both read the same weights, or refuse at the same level."""
    if isinstance(ours, str) or isinstance(theirs, str):
        assert isinstance(ours, str) and ours == theirs
        return False
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        assert np.array_equal(weights.view(np.uint32), theirs[name].view(np.uint32)), name
    return True
