"""The exported files for readers in other languages match the cases."""

from __future__ import annotations

import json
from pathlib import Path

from tests.hostile.export import main
from tests.hostile.reading import outcome
from tests.spec.document import VECTORS


def test_export(tmp_path: Path) -> None:
    main(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert len(index) == len(list(tmp_path.iterdir())) - 1 > 250
    for entry in [entry for entry in index if entry["level"] != "semantics"][::10]:
        file = tmp_path / entry["file"]
        found = outcome(VECTORS / entry["model"], file) if "model" in entry else outcome(file)
        assert found == entry["level"], entry
