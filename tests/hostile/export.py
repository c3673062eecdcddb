"""Writes the hostile files that depend only on the vectors to a folder, for testing a reader in another language.

    python -m tests.hostile.export FOLDER

index.json lists each with `file`, `refusal`, `level` (rkf-1.md, section 17, and program.md, section 10) and, for values
files, the `model`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.hostile.file_cases import BINDINGS
from tests.hostile.forge import mutate
from tests.hostile.sources import SOURCES
from tests.hostile.test_refusals import CASES, LEVELS
from tests.spec.document import VECTORS


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    index = []
    for number, case in enumerate(case for case in [*CASES, *BINDINGS] if case.source in SOURCES):
        name = f"{number:03}-{case.refusal}{Path(SOURCES[case.source]).suffix}"
        (folder / name).write_bytes(mutate((VECTORS / SOURCES[case.source]).read_bytes(), case.edits))
        entry = {"about": case.name, "file": name, "level": LEVELS[case.refusal], "refusal": case.refusal}
        index.append(entry | ({"model": "everything.rkf"} if case.source == "regrouped" else {}))
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
