"""The fuzz targets on bytes that once broke them, and on some by chance. `make fuzz` looks for more."""

import random
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
KEPT = [(path.parent.name, path) for path in sorted(CORPUS.glob("*/*")) if path.is_file()]


@pytest.mark.parametrize(("name", "path"), KEPT, ids=[f"{name}-{path.name}" for name, path in KEPT])
def test_what_once_broke_a_reader(tmp_path, name, path):
    TARGETS[name](tmp_path, path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_bytes_by_chance(tmp_path, name):
    rng = random.Random(name)
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        TARGETS[name](folder, rng.randbytes(64))
