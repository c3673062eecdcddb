"""The results of a study on disk: `results.json`, complete after every trial, and the same rows as `results.csv`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rkf.errors import CorruptError, UsageError
from rkf.file import kept_json
from rkf.file.atomic import replacing, reporting
from rkf.study.charts import Row
from rkf.study.subject import Trial
from rkf.text.reading import read_bytes

RESULTS, TABLE = "results.json", "results.csv"
KIND = "study 1"


class Records:
    """The folder of one study. about: describes it; runs with equal about["fingerprint"] may continue each other.
    UsageError if the folder has results of another study.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._folder = folder
        with reporting(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.about, self.rows = dict(about), list[Row]()
        if (folder / RESULTS).exists():
            earlier, self.rows = read(folder)
            if earlier["fingerprint"] != about["fingerprint"]:
                holds = "a study of another model, text, calibration or layers"
                raise UsageError(f"{folder}: holds {holds}: choose another folder")
            self.about = {**earlier, **about}
            self._save_table()  # a run that was killed between the two files left an older one

    def own(self, name: str) -> Path:
        """The path of a file or folder that only runs with the same fingerprint may share."""
        path = self._folder / name
        return path.with_stem(f"{path.stem}-{self.about['fingerprint'][:12]}")

    def find(self, trial: Trial) -> Row | None:
        """The row of a trial that was already run."""
        return next((row for row in self.rows if row["trial"] == trial.name), None)

    def add(self, trial: Trial) -> None:
        """Run a trial and save its results."""
        self.rows.append({"trial": trial.name, **trial.factors, **trial.measure()})
        self.save()

    def save(self) -> None:
        whole = kept_json.label(KIND, {**self.about, "trials": self.rows}) | self.about
        about = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in whole.items())
        trials = ",\n".join(map(json.dumps, self.rows))  # one per line, readable and easy to diff
        write_text(self._folder / RESULTS, f'{{{about}"trials": [\n{trials}\n]}}\n')
        self._save_table()

    def _save_table(self) -> None:
        write_text(self._folder / TABLE, _csv(self.rows))


def read(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """(about, rows) of a folder. Raises CorruptError."""
    path = folder / RESULTS
    try:
        with path.open("rb") as file:
            found = kept_json.opened(KIND, read_bytes(file, str(path)))
        rows = found.pop("trials")
        if not isinstance(found["fingerprint"], str) or not all(isinstance(row["trial"], str) for row in rows):
            raise TypeError("trials without names")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{path}: not the results of a study ({error}): remove it to start again") from error
    return found, rows


def write_text(path: Path, text: str) -> None:
    """Replace the file at once: after a failure it is the old one."""
    with replacing(path, force=True) as output:
        output.write(text.encode(errors="backslashreplace"))  # results of others may hold half a surrogate pair


def _csv(rows: Iterable[Row]) -> str:
    """Only single numbers; profiles by layer are in the JSON."""
    flat = [{key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in rows]
    written = io.StringIO()
    writer = csv.DictWriter(written, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return written.getvalue()
