"""The cost of a hostile file is bounded. Memory: 64 MiB, four times its size and twenty times its directory. Time: one
second, and one more for each MiB.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgpack
import numpy as np
import pytest
from blake3 import blake3

import rkf
from rkf.errors import IntegrityError
from rkf.file.archive import pack
from rkf.file.writer import Writer
from rkf.format.constants import ZSTD_CHUNK_BYTES
from rkf.format.matrix import ClusteredMatrix
from tests.hostile import strict
from tests.hostile.forge import mutate
from tests.hostile.test_refusals import CASES, LEVELS
from tests.spec.reference import load_section

ROOT = Path(__file__).resolve().parents[2]
MEBI = 1 << 20
# Directories of megabytes that are valid msgpack and ask for as much memory as they can.
LARGE: dict[str, Callable[[], bytes]] = {
    "a million empty maps": lambda: msgpack.packb({"tensors": [{}] * MEBI}),
    "a million empty lists": lambda: msgpack.packb({"sections": [[]] * MEBI}),
    "a million integers as chunks": lambda: msgpack.packb({"chunks": [1 << 62] * MEBI}),
    "a key of 16 MiB": lambda: msgpack.packb({"k" * (16 * MEBI): 1}),
    "a million short strings": lambda: msgpack.packb({"tensors": [f"{n % 90:02}" for n in range(MEBI)]}),
    "a million keys": lambda: msgpack.packb({f"{number:07}": 0 for number in range(MEBI)}),
}


def test_memory_and_time(sources: dict[str, bytes], tmp_path: Path) -> None:
    files = {}
    for number, case in enumerate(CASES):
        path = tmp_path / f"{number:03}.rkf"
        path.write_bytes(mutate(sources[case.source], case.edits))
        files[path.name] = case
    for name, packed in LARGE.items():
        (tmp_path / name).write_bytes(mutate(sources["everything"], {"packed": packed()}))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.hostile.hold_within", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    taken = json.loads(done.stdout)
    assert len(taken) == len(CASES) + len(LARGE)
    for file in taken:
        case = files.get(file["name"])
        name = file["name"] if case is None else f"{case.refusal}: {case.name}"
        directory = directory_bytes(tmp_path / file["name"])
        assert file["grown"] <= 64 * MEBI + 4 * file["file_bytes"] + 20 * directory, (name, file)
        assert file["seconds"] <= 1 + file["file_bytes"] / MEBI, (name, file)
        assert file["refused"] or case is None or LEVELS[case.refusal] == "semantics" or case.source == "regrouped", (
            name
        )


def directory_bytes(path: Path) -> int:
    """The declared length of the directory, if the file has that many bytes."""
    length = int.from_bytes(path.read_bytes()[40:48], "little")
    return length if length <= path.stat().st_size else 0


@pytest.fixture(scope="module")
def three_chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw.rkf, whose one plane is two full chunks and a short one, and with packed.rkf."""
    columns = 4096
    rows = (2 * ZSTD_CHUNK_BYTES + 12_345) * 2 // columns
    noise = blake3(b"three chunks").digest(length=rows * columns // 2)
    plane = (np.frombuffer(noise, np.uint8) & 0x11).reshape(rows, columns // 2)  # ranks 0 and 1: zstd shrinks them
    matrix = ClusteredMatrix(
        shape=(rows, columns),
        planes=(plane,),
        counts=np.zeros((1, 16), np.uint64),
        centroids=np.arange(16, dtype=np.float32).reshape(1, 16),
        rows_per_table=rows,
        source_dtype="f32",
    )
    folder = tmp_path_factory.mktemp("chunks")
    with Writer(folder / "raw.rkf", metadata={}, provenance={}) as writer:
        writer.add("w", matrix)
    pack(folder / "raw.rkf", folder / "packed.rkf")
    return folder


def test_chunks_of_both_readers(three_chunks: Path) -> None:
    data = (three_chunks / "packed.rkf").read_bytes()
    _, directory = strict.check_file(data)
    section = directory["sections"][0]
    assert section["codec"] == "zstd" and len(section["chunks"]) == 3
    with rkf.open(three_chunks / "raw.rkf") as raw, rkf.open(three_chunks / "packed.rkf") as packed:
        assert np.array_equal(raw.section(0), packed.section(0))
        assert load_section(data, section) == raw.section(0).tobytes()


@pytest.mark.parametrize("change", ("swapped", "moved", "short first"))
def test_chunks_out_of_place(change: str, three_chunks: Path, tmp_path: Path) -> None:
    """Chunks that are frames of the right sizes in the wrong order; a moved border; chunks of other decoded sizes."""
    data, path = (three_chunks / "packed.rkf").read_bytes(), tmp_path / "hostile.rkf"
    _, directory = strict.check_file(data)
    first, second, third = directory["sections"][0]["chunks"]
    if change == "swapped":
        edits = {
            "section/0": lambda old: old[first : first + second] + old[:first] + old[first + second :],
            "directory/sections/0/chunks": [second, first, third],
        }
    elif change == "moved":
        edits = {"directory/sections/0/chunks": [first + 1, second - 1, third]}
    else:
        edits = {
            "section/0": lambda old: old[first + second :] + old[: first + second],
            "directory/sections/0/chunks": [third, first, second],
        }
    path.write_bytes(mutate(data, edits))
    with rkf.open(path) as container, pytest.raises(IntegrityError, match=r"section 0 \(plane\)"):
        container.load("w")
    with pytest.raises(strict.Refused) as caught:
        strict.read(path)
    assert caught.value.args[0] == "integrity"
