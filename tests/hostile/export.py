"""Writes the hostile files that depend only on the vectors, for testing a reader in another language.

    python -m tests.hostile.export                 # to spec/hostile.tar.xz
    python -m tests.hostile.export --to FOLDER

index.json lists each with `file`, `refusal`, `level` (the tables of rkf-1.md, program.md and parts.md) and, for values
files, the `model`. A model in parts has a folder of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import shutil
import tarfile
import tempfile
from pathlib import Path

from tests.hostile.file_cases import BINDINGS
from tests.hostile.forge import mutate
from tests.hostile.sources import SOURCES
from tests.hostile.test_parts import FAULTS, NAMES
from tests.hostile.test_parts import LEVELS as LEVELS_OF_PARTS
from tests.hostile.test_refusals import CASES, LEVELS
from tests.spec.document import SPEC, VECTORS

ARCHIVE = SPEC / "hostile.tar.xz"


def write(folder: Path) -> None:
    """Every file, and index.json."""
    folder.mkdir(parents=True, exist_ok=True)
    index = []
    for number, case in enumerate(case for case in [*CASES, *BINDINGS] if case.source in SOURCES):
        name = f"{number:03}-{case.refusal}{Path(SOURCES[case.source]).suffix}"
        (folder / name).write_bytes(mutate((VECTORS / SOURCES[case.source]).read_bytes(), case.edits))
        entry = {"about": case.name, "file": name, "level": LEVELS[case.refusal], "refusal": case.refusal}
        index.append(entry | ({"model": "everything.rkf"} if case.source == "regrouped" else {}))
    for number, fault in enumerate(FAULTS):
        place = folder / f"parts-{number:02}"
        place.mkdir()
        for name in NAMES:
            shutil.copy(VECTORS / name, place / name)
        fault.change(place)
        entry = {"about": fault.name, "file": f"{place.name}/{NAMES[0]}"}
        index.append({**entry, "level": LEVELS_OF_PARTS[fault.refusal], "refusal": fault.refusal})
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder and its folders, by its path there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def packed(files: dict[str, bytes]) -> bytes:
    """A .tar.xz of them, without times and owners. They differ little, so it is a hundredth of their size."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return lzma.compress(data.getvalue(), preset=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, metavar="FOLDER")
    folder = parser.parse_args().to
    if folder is not None:
        write(folder)
        return
    with tempfile.TemporaryDirectory() as made:
        write(Path(made))
        ARCHIVE.write_bytes(packed(contents(Path(made))))


if __name__ == "__main__":
    main()
