"""The first 128 bytes: other file formats, and each field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rkf.errors import NotRkfError, RkfError, StructureError, UnsupportedError
from rkf.format.constants import KIND_PART, MAGIC, MAX_DIRECTORY_BYTES, SUPERBLOCK, SUPERBLOCK_BYTES
from rkf.format.superblock import parse_superblock
from tests.format import build

FIELDS = ("magic", "major", "minor", "kind", "required", "optional", "offset", "length", "bytes", "hash", "reserved")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build.write_model(tmp_path_factory.mktemp("superblock") / "model.rkf").read_bytes()


def changed(data: bytes, **changes: Any) -> bytes:
    """The first 128 bytes with other fields and the hash recomputed."""
    fields = list(SUPERBLOCK.unpack_from(data))
    for name, value in changes.items():
        fields[FIELDS.index(name)] = value
    return build.with_superblock(data, fields)[:SUPERBLOCK_BYTES]


def test_it_encodes_to_the_bytes_it_was_parsed_from(data: bytes) -> None:
    assert parse_superblock(data).encode() == data[:SUPERBLOCK_BYTES]


def test_newer_minor_versions_and_optional_features_are_read(data: bytes) -> None:
    superblock = parse_superblock(changed(data, minor=7, optional=1 << 63))
    assert (superblock.minor, superblock.optional) == (7, 1 << 63)


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"", "empty"),
        (bytes(128), "never committed"),
        (bytes(5), "never committed"),
        (b"GGUF\x03", "GGUF"),
        (b"PK\x03\x04", "zip"),
        (b"version https://git-lfs.github.com/spec/v1", "LFS"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x1f\x8b\x08", "gzip"),
        (b'{"a": 1}', "JSON"),
        (b'\x40\0\0\0\0\0\0\0{"__metadata__"', "safetensors"),
        (b"\x89RKF\n\x1a\n" + bytes(200), "line ends"),
        (b"\x89RKF\r\n\x1a\r\n" + bytes(200), "line ends"),
        (b"\x89PNG\r\n\x1a\n", "89 50 4e 47"),
    ],
)
def test_other_files_are_named(start: bytes, what: str) -> None:
    with pytest.raises(NotRkfError, match=what):
        parse_superblock(start)


@pytest.mark.parametrize("length", [1, 7, 8, 127])
def test_a_short_file_is_refused(data: bytes, length: int) -> None:
    with pytest.raises(StructureError, match="truncated"):
        parse_superblock(data[:length])


@pytest.mark.parametrize(
    ("changes", "error", "what"),
    [
        ({"major": 0}, UnsupportedError, "version"),
        ({"major": 2}, UnsupportedError, "version"),
        ({"required": 1 << 40 | 2}, UnsupportedError, r"bits \[1, 40\]"),
        ({"kind": KIND_PART}, UnsupportedError, "part of an unknown form"),
        ({"kind": 0}, StructureError, "kind"),
        ({"kind": 9}, StructureError, "kind"),
        ({"reserved": b"1234567\0"}, StructureError, "reserved"),
        ({"length": 0}, StructureError, "directory length"),
        ({"length": MAX_DIRECTORY_BYTES + 1}, StructureError, "directory length"),
        ({"length": 2**63 - 1}, StructureError, "directory length"),
        ({"offset": 64}, StructureError, "directory offset"),
        ({"offset": 129}, StructureError, "directory offset"),
        ({"offset": 2**64 - 64}, StructureError, "file length"),
        ({"bytes": 5}, StructureError, "file length"),
    ],
)
def test_each_field_is_checked(data: bytes, changes: dict[str, Any], error: type[RkfError], what: str) -> None:
    with pytest.raises(error, match=what):
        parse_superblock(changed(data, **changes))


def test_every_flipped_bit_is_refused(data: bytes) -> None:
    for position in range(SUPERBLOCK_BYTES * 8):
        flipped = bytearray(data[:SUPERBLOCK_BYTES])
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises((StructureError, NotRkfError)):
            parse_superblock(bytes(flipped))
    assert data.startswith(MAGIC)


def test_an_unfinished_file_is_not_rkf(tmp_path: Path) -> None:
    with pytest.raises(NotRkfError, match="never committed"):
        parse_superblock(bytes(SUPERBLOCK_BYTES) + b"planes")
