"""Every file that a reader must refuse: what is done to a sound one, by which rule of the specification it is refused.

A case names its refusal (the table of rkf-1.md, section 17) and what the message must mention.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from tests.hostile.forge import REMOVED

TWO_TO_63 = 1 << 63


@dataclass(frozen=True)
class Case:
    """source: a name of tests/hostile/conftest.py ("regrouped" is a values file); edits: see tests/hostile/forge.py.

    large: its directory has megabytes, so one test of it is enough.
    """

    name: str
    refusal: str
    mentions: str
    edits: Mapping[str, Any]
    source: str = "everything"
    large: bool = False


def put(offset: int, data: bytes) -> Callable[[bytes], bytes]:
    """Overwrite some bytes of a section."""
    return lambda old: old[:offset] + data + old[offset + len(data) :]


def set_bits(offset: int, bits: int) -> Callable[[bytes], bytes]:
    """Set bits of one byte of a section, which must be clear."""

    def changed(old: bytes) -> bytes:
        assert not old[offset] & bits
        return put(offset, bytes([old[offset] | bits]))(old)

    return changed


def cut(count: int) -> Callable[[bytes], bytes]:
    return lambda old: old[:-count]


def grow(data: bytes) -> Callable[[bytes], bytes]:
    return lambda old: old + data


def f32(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def f16(*values: float) -> bytes:
    return np.array(values, "<f2").tobytes()


def deep(count: int, opening: bytes, innermost: bytes) -> bytes:
    return opening * count + innermost


def swap(first: int, second: int) -> Callable[[list[Any]], list[Any]]:
    def swapped(items: list[Any]) -> list[Any]:
        items[first], items[second] = items[second], items[first]
        return items

    return swapped


def many_dense(count: int) -> list[dict[str, Any]]:
    """Tensors that all claim section 0."""
    one = {"data": 0, "dtype": "bf16", "kind": "dense", "shape": [5]}
    return [dict(sorted((one | {"name": f"t{number:06}"}).items())) for number in range(count)]


EMPTY_MAP = msgpack.packb({})
NOT_RKF = [
    Case("empty", "magic", "empty", {"file": lambda data: b""}),
    Case("GGUF", "magic", "GGUF", {"file": lambda data: b"GGUF\x03\x00\x00\x00" + bytes(200)}),
    Case(
        "safetensors", "magic", "safetensors", {"file": lambda data: struct.pack("<Q", 80) + b'{"a":{}}' + bytes(200)}
    ),
    Case("zip", "magic", "zip", {"file": lambda data: b"PK\x03\x04" + bytes(200)}),
    Case(
        "LFS pointer",
        "magic",
        "LFS",
        {"file": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00"},
    ),
    Case("HTML", "magic", "HTML", {"file": lambda data: b"<!DOCTYPE html><html>" + bytes(200)}),
    Case("something else", "magic", "52 49 46 46", {"file": lambda data: b"RIFF" + bytes(200)}),
    Case("CRLF to LF", "magic", "binary mode", {"file": lambda data: data.replace(b"\r\n", b"\n")}),
    Case("LF to CRLF", "magic", "binary mode", {"file": lambda data: data.replace(b"\n", b"\r\n")}),
    Case("never committed", "uncommitted", "never committed", {"file": lambda data: bytes(128) + data[128:]}),
    Case("zeros alone", "uncommitted", "never committed", {"file": lambda data: bytes(128)}),
]

SUPERBLOCKS = [
    Case("a magic alone", "short", "superblock", {"file": lambda data: data[:8]}),
    Case("half a magic", "short", "superblock", {"file": lambda data: data[:3]}),
    Case("half a superblock", "short", "superblock", {"file": lambda data: data[:127]}),
    Case("major 0", "major", "version", {"superblock/major": 0}),
    Case("major 2", "major", "version", {"superblock/major": 2}),
    Case("feature dense overrides", "feature", "[1]", {"superblock/required": 2}),
    Case("unknown features", "feature", "[5, 63]", {"superblock/required": 1 << 63 | 1 << 5}),
    Case("a part", "file-kind", "part", {"superblock/kind": 3}),
    Case("kind 0", "superblock", "kind", {"superblock/kind": 0}),
    Case("kind 4", "superblock", "kind", {"superblock/kind": 4}),
    Case("reserved byte", "superblock", "reserved", {"superblock/reserved": b"\0\0\0\0\0\0\0\1"}),
    Case("superblock hash", "superblock", "superblock", {"superblock/superblock_hash": bytes(32)}),
    Case("directory length 0", "extent", "directory length", {"superblock/directory_length": 0}),
    Case("directory beyond the file", "extent", "file length", {"superblock/directory_length": lambda old: old + 1}),
    Case("directory length 2^63-1", "extent", "directory length", {"superblock/directory_length": TWO_TO_63 - 1}),
    Case(
        "directory length over the cap", "extent", "directory length", {"superblock/directory_length": (64 << 20) + 1}
    ),
    Case("directory offset 2^63", "extent", "file length", {"superblock/directory_offset": TWO_TO_63}),
    Case("directory offset 2^64-64", "extent", "file length", {"superblock/directory_offset": (1 << 64) - 64}),
    Case("directory in the superblock", "extent", "directory offset", {"superblock/directory_offset": 64}),
    Case("directory misaligned", "extent", "directory offset", {"superblock/directory_offset": lambda old: old - 8}),
    Case("file length too small", "extent", "file length", {"superblock/file_length": lambda old: old - 1}),
    Case("file length 2^64-1", "extent", "file length", {"superblock/file_length": (1 << 64) - 1}),
    Case("a byte after the end", "extent", "after the end", {"file": lambda data: data + b"\0"}),
    Case("the last byte missing", "extent", "truncated", {"file": lambda data: data[:-1]}),
    Case("the superblock alone", "extent", "truncated", {"file": lambda data: data[:128]}),
    Case("directory hash", "directory-hash", "directory", {"superblock/directory_hash": bytes(32)}),
]

NOT_MSGPACK = {
    "not msgpack": b"\xc1",
    "noise": bytes(range(255, 200, -1)),
    "ends early": lambda packed: packed[:-1],
    "bytes behind it": lambda packed: packed + b"\0",
    "two maps": lambda packed: packed + packed,
    "a list of 2^32-1 at the top": b"\xdd\xff\xff\xff\xff",
    "100,000 lists deep": deep(100_000, b"\x91", b"\x90"),
}
# What stands in place of the metadata of a directory that is sound otherwise, and what the message says of it.
NOT_CANONICAL = {
    "100,000 maps deep": (deep(100_000, b"\x81\xa1a", b"\x80"), "deep"),
    "9 deep": (deep(7, b"\x81\xa1a", b"\x80"), "deep"),
    "a list of 2^32-1": (b"\x81\xa1a\xdd\xff\xff\xff\xff", "as many as bytes remain"),
    "a map of 2^32-1": (b"\xdf\xff\xff\xff\xff", "as many as bytes remain"),
    "a string of 2^32-1": (b"\x81\xa1a\xdb\xff\xff\xff\xff", "msgpack"),
    "a binary of 2^32-1": (b"\x81\xa1a\xc6\xff\xff\xff\xff", "msgpack"),
    "nil": (b"\x81\xa1a\xc0", "nil"),
    "extension": (b"\x81\xa1a\xd4\x05\x00", "extension"),
    "time stamp": (b"\x81\xa1a\xd6\xff\x00\x00\x00\x00", "extension"),
    "extension of 2^32-1": (b"\x81\xa1a\xc9\xff\xff\xff\xff\x05", "extension"),
    "32-bit float": (b"\x81\xa1a\xca\x3f\x80\x00\x00", "re-encoding"),
    "NaN": (b"\x81\xa1a\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00", "canonical number"),
    "infinity": (b"\x81\xa1a\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00", "canonical number"),
    "negative zero": (b"\x81\xa1a\xcb\x80\x00\x00\x00\x00\x00\x00\x00", "canonical number"),
    "duplicate keys": (b"\x82\xa1a\x01\xa1a\x01", "twice"),
    "a long key twice": (b"\x82" + (b"\xda\xff\xff" + b"k" * 65535 + b"\x01") * 2, "twice"),
    "keys out of order": (b"\x82\xa1b\x01\xa1a\x01", "keys in order"),
    "keys by code unit": (b"\x82\xa4\xf0\x9f\x98\x80\x01\xa3\xee\x80\x80\x01", "keys in order"),
    "an integer as key": (b"\x81\x01\x01", "keys"),
    "a binary as key": (b"\x81\xc4\x01a\x01", "keys"),
    "a list as key": (b"\x81\x91\x01\x01", "keys"),
    "long positive integer": (b"\x81\xa1a\xcc\x7f", "re-encoding"),
    "longer positive integer": (b"\x81\xa1a\xcf\x00\x00\x00\x00\xff\xff\xff\xff", "re-encoding"),
    "signed positive integer": (b"\x81\xa1a\xd1\x01\x00", "re-encoding"),
    "long negative integer": (b"\x81\xa1a\xd0\xe0", "re-encoding"),
    "long string": (b"\x81\xd9\x01a\x01", "re-encoding"),
    "long binary": (b"\x81\xa1a\xc5\x00\x01\x00", "re-encoding"),
    "long list": (b"\x81\xa1a\xdc\x00\x01\x00", "re-encoding"),
    "long map": (b"\xde\x00\x01\xa1a\x01", "re-encoding"),
    "not UTF-8": (b"\x81\xa1a\xa1\xff", "msgpack"),
    "a surrogate": (b"\x81\xa1a\xa3\xed\xa0\x80", "msgpack"),
    "overlong UTF-8": (b"\x81\xa1a\xa2\xc0\x80", "msgpack"),
}


def as_metadata(value: bytes) -> Callable[[bytes], bytes]:
    """The encoded directory with other bytes for its empty metadata."""
    return lambda packed: packed.replace(b"\xa8metadata\x80", b"\xa8metadata" + value)


DIRECTORIES = [
    *(Case(name, "canonical", "directory", {"packed": packed}) for name, packed in NOT_MSGPACK.items()),
    *(Case(name, "canonical", says, {"packed": as_metadata(value)}) for name, (value, says) in NOT_CANONICAL.items()),
    Case("a list at the top", "schema", "directory", {"packed": b"\x90"}),
    Case("a string at the top", "schema", "directory", {"packed": b"\xa1a"}),
    Case("an empty map", "schema", "directory", {"packed": EMPTY_MAP}),
    Case("unknown key", "schema", "'extra'", {"directory/extra": 1}),
    Case("key missing", "schema", "'provenance'", {"directory/provenance": REMOVED}),
    Case("metadata a list", "schema", "metadata", {"directory/metadata": []}),
    Case("provenance a string", "schema", "provenance", {"directory/provenance": "x"}),
    Case("sections a map", "schema", "sections", {"directory/sections": {}}),
    Case("tensors a map", "schema", "tensors", {"directory/tensors": {}}),
    Case("a tensor that is a list", "schema", "tensor 0", {"directory/tensors/0": []}),
    Case("a section that is a string", "schema", "section 0", {"directory/sections/0": "plane"}),
    Case("ranks_id wrong", "identity", "ranks_id", {"directory/ranks_id": bytes(32)}),
    Case("dense_id wrong", "identity", "dense_id", {"directory/dense_id": bytes(32)}),
    Case("ranks_id short", "schema", "ranks_id", {"directory/ranks_id": bytes(31)}),
    Case("dense_id a string", "schema", "dense_id", {"directory/dense_id": "0" * 32}),
    Case("order in a model file", "schema", "'order'", {"directory/order": "ascending"}),
    Case("too many maps", "limit", "maps", {"directory/metadata/x": [{}] * (1 << 19)}, large=True),
    Case("too many tensors", "limit", "tensors", {"directory/tensors": [0] * ((1 << 20) + 1)}, large=True),
    Case("too many sections", "limit", "sections", {"directory/sections": [0] * ((1 << 20) + 1)}, large=True),
    Case("too many values", "limit", "values", {"directory/metadata/x": [0] * (1 << 22)}, large=True),
    Case("too many values that are free", "limit", "values", {"directory/x-free": [0] * (1 << 22)}, large=True),
]

SECTIONS = [
    Case("past the end", "section-extent", "section 11", {"directory/sections/11/length": 1 << 20}),
    Case("length 2^63", "section-extent", "section 4", {"directory/sections/4/length": TWO_TO_63}),
    Case("offset 2^63", "section-extent", "section 4", {"directory/sections/4/offset": TWO_TO_63}),
    Case("negative offset", "schema", "section 4", {"directory/sections/4/offset": -64}),
    Case("floating offset", "schema", "section 0", {"directory/sections/0/offset": 128.0}),
    Case("offset a boolean", "schema", "section 0", {"directory/sections/0/offset": True}),
    Case("overlap of each other", "section-extent", "overlaps", {"directory/sections/1/offset": 128}),
    Case("overlap of the superblock", "section-extent", "overlaps", {"directory/sections/0/offset": 64}),
    Case(
        "overlap of the directory",
        "section-extent",
        "section 11",
        {"directory/sections/11/offset": lambda old: old + 64},
    ),
    Case("a hole", "section-extent", "section 4", {"directory/sections/4/offset": lambda old: old + 64}),
    Case("misaligned", "section-extent", "section 4", {"directory/sections/4/offset": lambda old: old + 1}),
    Case("zero length", "section-extent", "section 8", {"directory/sections/8/length": 0}),
    Case("no room before the directory", "section-extent", "directory", {"directory/sections": lambda old: old[:-1]}),
    Case("padding after a section", "padding", "padding", {"padding/152": 1}),
    Case("padding before the directory", "padding", "padding", {"padding/3135": 0x80}),
    Case("padding inside the values", "padding", "values", {"section/9": put(404, b"\1")}),
    Case("hash of a plane", "section-hash", "section 0", {"directory/sections/0/hash": bytes(32)}),
    Case("hash of a blob", "section-hash", "section 11", {"directory/sections/11/hash": bytes(32)}),
    Case("hash too long", "schema", "section 0", {"directory/sections/0/hash": bytes(33)}),
    Case("hash missing", "schema", "section 0", {"directory/sections/0/hash": REMOVED}),
    Case("unknown codec", "schema", "section 0", {"directory/sections/0/codec": "lz4"}),
    Case("codec a list", "schema", "section 0", {"directory/sections/0/codec": ["raw"]}),
    Case("unknown kind", "schema", "section 0", {"directory/sections/0/kind": "index"}),
    Case("unknown key of a section", "schema", "section 0", {"directory/sections/0/checksum": 1}),
    Case("raw with chunks", "schema", "section 0", {"directory/sections/0/chunks": [24]}),
    Case("a plane with a name", "schema", "section 0", {"directory/sections/0/name": "x-plane"}),
    Case("a blob without a name", "schema", "section 11", {"directory/sections/11/name": REMOVED}),
    Case("a blob of an unknown name", "schema", "section 11", {"directory/sections/11/name": "tokenizer.model"}),
    Case(
        "blobs out of order",
        "name",
        "section 11",
        {"directory/sections/10/name": "x-1", "directory/sections/11/name": "x-0"},
    ),
    Case("two blobs of one name", "name", "section 11", {"directory/sections/10/name": "tokenizer.json"}),
    Case("a blob's empty name", "name", "section 11", {"directory/sections/11/name": ""}),
    Case("a blob's name with an escape", "name", "section 11", {"directory/sections/11/name": "x-\x1b[31m"}),
    Case("plane as counts", "section-order", "body", {"directory/sections/2/kind": "counts"}),
    Case("two sections swapped, hashes too", "section-order", "", {"directory/sections": swap(8, 9)}),
    Case("a section of no tensor", "section-order", "head", {"directory/tensors/body": REMOVED}),
    Case(
        "the last tensor's section of no tensor",
        "section-order",
        "section",
        {"directory/tensors/norm": REMOVED, "directory/tensors/other-alias": REMOVED},
    ),
    Case("sections end before a tensor's", "section-order", "'norm'", {"keep/8": None}),
    Case("sections end before the values", "section-order", "values", {"keep/9": None}),
    Case(
        "a section behind the values that is no blob",
        "section-order",
        "section 10",
        {"directory/sections/10/kind": "plane", "directory/sections/10/name": REMOVED},
    ),
    Case("a tensor without its section", "section-order", "norm", {"directory/tensors/norm/data": 99}),
    Case("two tensors, one section", "section-order", "norm", {"directory/tensors/norm/data": 0}),
    Case("planes in another order", "section-order", "body", {"directory/tensors/body/planes": [1, 0, 2]}),
    Case("a negative section", "schema", "body", {"directory/tensors/body/counts": -1}),
    Case("counts of another tensor", "section-order", "body", {"directory/tensors/body/counts": 6}),
    Case(
        "100,000 tensors on one section",
        "section-order",
        "tensor",
        {"directory/tensors": many_dense(100_000)},
        large=True,
    ),
]
