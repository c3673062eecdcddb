"""Damage at any place is found: every truncation, every flipped bit, blocks zeroed and swapped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import rkf
from rkf.errors import CorruptError, IntegrityError, NotRkfError, RkfError, StructureError
from tests.hostile.reading import outcome, reference_outcome
from tests.spec.document import VECTORS

BLOCK = 256


def refusal(path: Path) -> type[RkfError] | None:
    try:
        rkf.open(path).close()
    except RkfError as error:
        return type(error)
    return None


def due(offset: int, directory: int) -> type[RkfError]:
    """The expected error for a changed byte at an offset; the directory begins at `directory`."""
    if offset < 8:
        return NotRkfError
    return StructureError if offset < 128 or offset >= directory else IntegrityError


def directory_offset(data: bytes) -> int:
    return int.from_bytes(data[32:40], "little")


def flips(size: int, bits: range) -> Iterator[tuple[int, int]]:
    return ((offset, 1 << bit) for offset in range(size) for bit in bits)


@pytest.mark.parametrize("name", ("smallest.rkf", "regrouped.rkv", "zstd.rkf"))
def test_every_flipped_bit_is_refused(name: str, tmp_path: Path) -> None:
    check_flips((VECTORS / name).read_bytes(), tmp_path / name, range(8))


@pytest.mark.parametrize("name", ("everything.rkf", "free.rkf"))
def test_a_flipped_bit_of_every_byte_is_refused(name: str, tmp_path: Path) -> None:
    """Files with more sections take longer, so only one bit of each byte is flipped."""
    check_flips((VECTORS / name).read_bytes(), tmp_path / name, range(3, 4))


def check_flips(data: bytes, path: Path, bits: range) -> None:
    path.write_bytes(data)
    assert refusal(path) is None
    directory, accepted = directory_offset(data), []
    with path.open("r+b", buffering=0) as file:
        for offset, bit in flips(len(data), bits):
            os.pwrite(file.fileno(), bytes([data[offset] ^ bit]), offset)
            found = refusal(path)
            if found is not due(offset, directory):
                accepted.append((offset, bit, found))
            os.pwrite(file.fileno(), data[offset : offset + 1], offset)
    assert not accepted


def test_the_reference_reader_refuses_flips(tmp_path: Path) -> None:
    data, path = (VECTORS / "smallest.rkf").read_bytes(), tmp_path / "flipped.rkf"
    for offset, bit in flips(len(data), range(5, 6)):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ bit]) + data[offset + 1 :])
        assert isinstance(reference_outcome(path), str), (offset, bit)


@pytest.mark.parametrize("name", ("everything.rkf", "regrouped.rkv", "zstd.rkf"))
def test_every_truncation_is_refused(name: str, tmp_path: Path) -> None:
    data, path = (VECTORS / name).read_bytes(), tmp_path / name
    path.write_bytes(data)
    for length in reversed(range(len(data))):
        os.truncate(path, length)
        assert refusal(path) is (StructureError if length else NotRkfError), length


def test_the_reference_reader_refuses_truncations(tmp_path: Path) -> None:
    data, path = (VECTORS / "everything.rkf").read_bytes(), tmp_path / "short.rkf"
    path.write_bytes(data)
    for length in reversed(range(len(data))):
        os.truncate(path, length)
        assert reference_outcome(path) == ("structure" if length else "not-rkf"), length


def test_blocks_zeroed_or_swapped(sources: dict[str, bytes], tmp_path: Path) -> None:
    data, path = sources["model"], tmp_path / "model.rkf"
    starts = range(0, len(data) - BLOCK, BLOCK)
    damaged = [data[:at] + bytes(BLOCK) + data[at + BLOCK :] for at in starts]
    damaged += [
        data[:at] + data[at + BLOCK : at + 2 * BLOCK] + data[at : at + BLOCK] + data[at + 2 * BLOCK :]
        for at in starts[:-1]
    ]
    changed = [file for file in damaged if file != data]
    assert len(changed) > 1.9 * len(starts)
    for file in changed:
        path.write_bytes(file)
        assert issubclass(refusal(path) or Exception, (CorruptError, NotRkfError))


def test_files_joined_or_cut_apart(tmp_path: Path) -> None:
    """The head of one file with the tail of another; a file twice; one file behind another."""
    one, other = (VECTORS / "everything.rkf").read_bytes(), (VECTORS / "zstd.rkf").read_bytes()
    path = tmp_path / "joined.rkf"
    for file in (one + one, one + other, one[:128] + other[128:], one[:1000] + other[1000:], one[64:]):
        path.write_bytes(file)
        assert outcome(path) in ("structure", "not-rkf")
