"""Models in parts: faults of the index and of its parts, one at a time, for both readers; and what a message names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest
from blake3 import blake3

import rkf
from rkf.errors import CorruptError, RkfError, StructureError, UsageError
from rkf.file.body import verify_part
from tests.hostile import strict
from tests.hostile.forge import REMOVED, SUPERBLOCK, edited
from tests.hostile.reading import LEVEL_ERRORS, read_all
from tests.spec.document import VECTORS, code, table

SECOND = "parts-00002-of-00005.rkf"
NAMES = ["parts.rkf", *(f"parts-{number:05}-of-00005.rkf" for number in range(1, 6))]
LEVELS = {
    code(row[0])[0]: row[1]
    for document in ("rkf-1.md", "parts.md")
    for row in table(document, "refusal", "level", f"the {'file' if document == 'rkf-1.md' else 'model'} is refused if")
}


def rewrite(path: Path, *, required: int | None = None, kind: int | None = None, **edits: Any) -> None:
    """Change a file's directory (keys with __ for /) or its superblock, and make the hashes good."""
    data = path.read_bytes()
    block = list(SUPERBLOCK.unpack_from(data))
    directory: Any = msgpack.unpackb(data[block[6] :])
    for place, value in edits.items():
        directory = edited(directory, place.split("__"), value)
    packed = msgpack.packb(directory)
    block[3] = block[3] if kind is None else kind
    block[4] = block[4] if required is None else required
    block[7:10] = len(packed), block[6] + len(packed), blake3(packed).digest()
    head = SUPERBLOCK.pack(*block)[:96]
    path.write_bytes(head + blake3(head).digest() + data[128 : block[6]] + packed)


def adopt(folder: Path) -> None:
    """Make the index describe its second part as it is now, so that a reader meets the check behind the hash."""
    data = (folder / SECOND).read_bytes()
    told = {"parts__1__directory_hash": data[56:88], "parts__1__length": len(data)}
    rewrite(folder / "parts.rkf", **told)


def in_index(**edits: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "parts.rkf", **edits)


def in_part(**edits: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        rewrite(folder / SECOND, **edits)
        adopt(folder)

    return change


def with_part(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / SECOND).write_bytes(change((folder / SECOND).read_bytes()))

    return write


def swapped(folder: Path) -> None:
    third = folder / SECOND.replace("2-of", "3-of")
    data = third.read_bytes()
    third.write_bytes((folder / SECOND).read_bytes())
    (folder / SECOND).write_bytes(data)


def spoilt(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@dataclass(frozen=True)
class Fault:
    """change: of the files in a folder. mentions: in the message. alone: whether the part shows it by itself."""

    name: str
    refusal: str
    mentions: str
    change: Callable[[Path], Any]
    alone: bool = False


def less(field: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda entry: {key: value for key, value in entry.items() if key != field}


FAULTS = [
    Fault("missing", "part", f"{SECOND}: part 2 of 5", lambda folder: (folder / SECOND).unlink()),
    Fault("swapped", "part", f"{SECOND}: directory, number: expected part 2, got part 3", swapped),
    Fault("cut", "extent", f"{SECOND}: expected 1060 bytes, got 1059", with_part(lambda data: data[:-1]), alone=True),
    Fault("longer", "extent", "bytes after the end", with_part(lambda data: data + b"\0"), alone=True),
    Fault("empty", "magic", f"{SECOND}: the file is empty", with_part(lambda data: b""), alone=True),
    Fault("unfinished", "uncommitted", SECOND, with_part(lambda data: bytes(len(data))), alone=True),
    Fault("a section's byte", "section-hash", f"{SECOND}: section 0", with_part(spoilt(130)), alone=True),
    Fault("padding", "padding", f"{SECOND}: file, padding", with_part(spoilt(930)), alone=True),
    Fault("its directory", "directory-hash", f"{SECOND}: directory", with_part(spoilt(1059)), alone=True),
    Fault("a model in its place", "part", f"{SECOND}: superblock, kind", in_part(kind=1, required=0)),
    Fault("without bit 0", "file-kind", SECOND, in_part(required=0), alone=True),
    Fault("of another number", "part", "part 2, got part 1", in_part(number=1)),
    Fault("of number 0", "schema", "number", in_part(number=0), alone=True),
    Fault("unknown key", "schema", "'of'", in_part(of=5), alone=True),
    Fault("another hash", "part", "part 2", in_part(sections__0__hash=bytes(32))),
    Fault("a section less", "part", "", in_part(sections=lambda old: old[:-1])),
    Fault("no sections", "part", "", in_part(sections=[])),
    Fault("another offset", "part", "", in_part(sections__0__offset=192), alone=True),
    Fault("not the one described", "part", "part 2", lambda folder: rewrite(folder / SECOND, **{"x-note": 1})),
    Fault("of a longer file", "part", "part 2", in_index(parts__1__length=1061)),
    Fault("another length", "parts", "part 2, length", in_index(parts__1__length=256)),
    Fault("no room for the directory", "parts", "part 2, length", in_index(parts__1__length=(64 << 20) + (1 << 20))),
    Fault("length a boolean", "parts", "part 2, length", in_index(parts__1__length=True)),
    Fault("hash short", "parts", "part 2, directory_hash", in_index(parts__1__directory_hash=bytes(31))),
    Fault("an empty part", "parts", "part 2, sections", in_index(parts__1__sections=0)),
    Fault("too many sections", "parts", "part 2, sections", in_index(parts__1__sections=99)),
    Fault("unknown key of a part", "parts", "'name'", in_index(parts__1__name="../../other.rkf")),
    Fault("key missing", "parts", "'length'", in_index(parts__1=less("length"))),
    Fault("a part that is a list", "parts", "part 2", in_index(parts__1=[])),
    Fault("no parts", "parts", "parts", in_index(parts=[])),
    Fault("parts a map", "parts", "parts", in_index(parts={})),
    Fault("a part too few", "parts", "sections in all", in_index(parts=lambda old: old[:-1])),
    Fault("without parts", "parts", "'parts'", in_index(parts=REMOVED)),
    Fault("parts without bit 0", "parts", "'parts'", in_index(required=0)),
    Fault("a values file with bit 0", "superblock", "never in parts", in_index(kind=2)),
    Fault("a section elsewhere", "section-extent", "section 3", in_index(sections__3__offset=1 << 20)),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        shutil.copy(VECTORS / name, tmp_path / name)
    return tmp_path


def test_sound(folder: Path) -> None:
    read_all(folder / "parts.rkf")
    strict.read(folder / "parts.rkf")
    adopt(folder)
    read_all(folder / "parts.rkf")
    for number, name in enumerate(NAMES[1:], 1):
        report = verify_part(folder / name)
        assert (report.number, report.index) == (number, "parts.rkf")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_refused(fault: Fault, folder: Path) -> None:
    index = folder / "parts.rkf"
    fault.change(folder)
    level = LEVELS[fault.refusal]
    with pytest.raises(RkfError) as caught:
        read_all(index)
    assert type(caught.value) is LEVEL_ERRORS[level]
    message = str(caught.value)
    assert message.startswith(f"{index}: ") and "\n" not in message and fault.mentions in message, message
    with pytest.raises(strict.Refused) as refused:
        strict.read(index)
    assert refused.value.args[0] == level


@pytest.mark.parametrize("fault", [each for each in FAULTS if each.alone], ids=lambda fault: fault.name)
def test_a_part_shows_it_alone(fault: Fault, folder: Path) -> None:
    fault.change(folder)
    with pytest.raises(LEVEL_ERRORS[LEVELS[fault.refusal]], match=SECOND):
        verify_part(folder / SECOND)


def test_every_refusal_has_cases() -> None:
    rows = table("parts.md", "refusal", "level", "the model is refused if")
    assert {code(row[0])[0] for row in rows} <= {fault.refusal for fault in FAULTS}


def test_a_part_is_no_model(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"is one part of a model: open parts\.rkf"):
        rkf.open(folder / SECOND)
    with pytest.raises(UsageError, match="expected a part"):
        verify_part(VECTORS / "smallest.rkf")


def test_faults_are_found_at_open(folder: Path) -> None:
    """Structure is checked of all parts at open; a byte of a section only with hashes."""
    with_part(spoilt(130))(folder)
    rkf.open(folder / "parts.rkf", check="structure").close()
    with pytest.raises(CorruptError, match=SECOND):
        rkf.open(folder / "parts.rkf")
    (folder / SECOND).unlink()
    with pytest.raises(StructureError, match=SECOND):
        rkf.open(folder / "parts.rkf", check="structure")


def test_a_link_to_the_index(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    link = folder / "elsewhere" / "m.rkf"
    link.symlink_to(folder / "parts.rkf")
    read_all(link)
