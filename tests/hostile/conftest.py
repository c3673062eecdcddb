"""The valid files from which the hostile tests start."""

from __future__ import annotations

import pytest

from tests.format.build import write_model
from tests.hostile.sources import SOURCES
from tests.spec.document import VECTORS


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    model = write_model(tmp_path_factory.mktemp("hostile") / "model.rkf")
    return {key: (VECTORS / name).read_bytes() for key, name in SOURCES.items()} | {"model": model.read_bytes()}
