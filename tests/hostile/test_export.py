"""The exported files for readers in other languages match the cases, and are those of the archive beside the spec."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from tests.hostile.export import ARCHIVE, contents, write
from tests.hostile.reading import outcome
from tests.spec.document import VECTORS


def test_export(tmp_path: Path) -> None:
    write(tmp_path)
    made = contents(tmp_path)
    index = json.loads(made["index.json"])
    assert len({Path(entry["file"]).parts[0] for entry in index}) == len(index) > 250
    for entry in [entry for entry in index if entry["level"] != "semantics"][::10]:
        file = tmp_path / entry["file"]
        found = outcome(VECTORS / entry["model"], file) if "model" in entry else outcome(file)
        assert found == entry["level"], entry
    with tarfile.open(ARCHIVE) as archive:
        kept = {each.name: archive.extractfile(each) for each in archive}
        differing = {name for name in kept.keys() | made.keys() if name not in kept or name not in made}
        differing |= {name for name, file in kept.items() if file is None or file.read() != made.get(name)}
    assert not differing, "run python -m tests.hostile.export"
