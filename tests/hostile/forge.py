"""Takes a file apart and puts it together wrong. Knows the layout, but uses none of the reader's code.

`mutate(data, {path: value})` changes the part that `path` names: "superblock/major", "directory/tensors/head/k" (lists
by number or by `name`), "section/3" (its stored bytes), "content/3" (its decoded bytes), "padding/300" (a byte of the
body), "keep/9" (only the sections before that number), "packed" (the bytes of the directory) or "file" (all bytes). A
callable value receives the old one. `reseal` recomputes every hash and length that was not named, so that the reader
reaches the check behind the hashes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from typing import Any

import msgpack
import zstandard
from blake3 import blake3

SUPERBLOCK = struct.Struct("<8sHHIQQQQQ32s8s32s")
FIELDS = (
    "magic", "major", "minor", "kind", "required", "optional", "directory_offset", "directory_length", "file_length",
    "directory_hash", "reserved", "superblock_hash",
)  # fmt: skip


class Edit(Enum):
    """REMOVED takes a key or an item away."""

    REMOVED = "removed"


REMOVED = Edit.REMOVED


def mutate(data: bytes, edits: Mapping[str, Any], *, reseal: bool = True) -> bytes:
    """The file with its edits; see the module's docstring."""
    forge = Forge(data)
    for path, value in edits.items():
        forge.edit(path, value)
    return forge.build(reseal)


def digest(data: bytes) -> bytes:
    return blake3(data).digest()


class Forge:
    """superblock: its fields by name; directory: the map; body: the bytes before the directory."""

    def __init__(self, data: bytes) -> None:
        self.superblock: dict[str, Any] = dict(zip(FIELDS, SUPERBLOCK.unpack_from(data), strict=True))
        start = self.superblock["directory_offset"]
        self.body, self.packed = bytearray(data[:start]), data[start:]
        self.directory: Any = msgpack.unpackb(self.packed)
        self.extents = [(s["offset"], s["offset"] + s["length"]) for s in self.directory["sections"]]
        self.edited: set[str] = set()
        self.whole: Callable[[bytes], bytes] | None = None

    def edit(self, path: str, value: Any) -> None:
        root, *keys = path.split("/")
        self.edited.add(path)
        if root == "superblock":
            self.superblock[keys[0]] = changed(self.superblock[keys[0]], value)
        elif root == "directory":
            self.directory = edited(self.directory, keys, value)
        elif root == "section":
            self._replace(int(keys[0]), value)
        elif root == "content":
            self._replace_content(int(keys[0]), value)
        elif root == "keep":
            self._keep(int(keys[0]))
        elif root == "padding":
            self.body[int(keys[0])] = value
        elif root == "packed":
            self.packed = changed(self.packed, value)
        else:
            self.whole = value

    def _replace(self, number: int, value: Any) -> None:
        """Put other bytes into a section; if their number changes, later sections move."""
        stored = [bytes(self.body[start:end]) for start, end in self.extents]
        stored[number] = changed(stored[number], value)
        self.body, extents = self.body[:128], []
        for data in stored:
            extents.append((len(self.body), len(self.body) + len(data)))
            self.body += data + bytes(-len(data) % 64)
        for section, (start, end) in zip(self.directory["sections"], extents, strict=True):
            section |= {"offset": start, "length": end - start}
        self.extents = extents

    def _keep(self, count: int) -> None:
        self.extents = self.extents[:count]
        self.directory["sections"] = self.directory["sections"][:count]
        end = self.extents[-1][1]
        self.body = self.body[: end + -end % 64]

    def _replace_content(self, number: int, value: Any) -> None:
        """Put other decoded bytes into a section. What zstd would shrink further than readers accept becomes raw."""
        section = self.directory["sections"][number]
        start, end = self.extents[number]
        content = bytes(self.body[start:end])
        if section["codec"] == "zstd":
            content = zstandard.ZstdDecompressor().decompress(content)
        content = changed(content, value)
        frame = zstandard.ZstdCompressor().compress(content)
        if section["codec"] == "zstd" and len(content) <= 256 * len(frame):
            self._replace(number, frame)
            section |= {"chunks": [len(frame)], "decoded_length": len(content), "stored_hash": digest(frame)}
        else:
            self._replace(number, content)
            section["codec"] = "raw"
            for key in ("chunks", "decoded_length", "stored_hash"):
                section.pop(key, None)
        section["hash"] = digest(content)

    def build(self, reseal: bool) -> bytes:
        if reseal:
            self._seal_sections()
            self._seal_identities()
        if "packed" not in self.edited:
            self.packed = msgpack.packb(self.directory)
        sealed = {
            "directory_offset": len(self.body),
            "directory_length": len(self.packed),
            "file_length": len(self.body) + len(self.packed),
            "directory_hash": digest(self.packed),
        }
        if reseal:
            self.superblock |= {key: value for key, value in sealed.items() if f"superblock/{key}" not in self.edited}
        head = SUPERBLOCK.pack(*self.superblock.values())
        if reseal and "superblock/superblock_hash" not in self.edited:
            head = head[:96] + digest(head[:96])
        file = head + bytes(self.body[128:]) + self.packed
        return file if self.whole is None else self.whole(file)

    def _seal_sections(self) -> None:
        for number, (start, end) in enumerate(self.extents):
            if f"section/{number}" in self.edited:
                with suppress(LookupError, TypeError):  # the directory may no longer have it
                    section = self.directory["sections"][number]
                    section["stored_hash" if section["codec"] == "zstd" else "hash"] = digest(self.body[start:end])

    def _seal_identities(self) -> None:
        """Recompute ranks_id and dense_id, if the directory still has them."""
        try:
            ranks, dense = identities(self.directory)
        except (LookupError, TypeError, AttributeError):
            return
        for key, value in (("ranks_id", ranks), ("dense_id", dense)):
            if f"directory/{key}" not in self.edited and self.superblock["kind"] == 1 and key in self.directory:
                self.directory[key] = digest(msgpack.packb(value))


def identities(directory: Any) -> tuple[list[Any], list[Any]]:
    """The hashed contents of ranks_id and dense_id."""
    hashes = [section["hash"] for section in directory["sections"]]
    ranks, dense = [], []
    for tensor in directory["tensors"]:
        if tensor["kind"] == "clustered":
            positions = hashes[tensor["exceptions"]["positions"]] if "exceptions" in tensor else b""
            planes = [hashes[number] for number in tensor["planes"]]
            sizes = [tensor[key] for key in ("name", "shape", "k", "rows_per_table")]
            ranks.append([*sizes, planes, hashes[tensor["counts"]], positions])
        elif tensor["kind"] == "dense":
            dense.append([tensor["name"], tensor["shape"], tensor["dtype"], hashes[tensor["data"]]])
    return ranks, dense


def changed(old: Any, value: Any) -> Any:
    return value(old) if callable(value) else value


def edited(node: Any, keys: list[str], value: Any) -> Any:
    """The node with the value placed at the end of the keys; keys of maps stay in order."""
    if not keys:
        return changed(node, value)
    key: Any = place(node, keys[0]) if isinstance(node, list) else keys[0]
    old = node[key] if isinstance(node, list) else node.get(key, REMOVED)
    new = edited(old, keys[1:], value)
    if new is REMOVED:
        del node[key]
        return node
    node[key] = new
    return node if isinstance(node, list) else dict(sorted(node.items()))


def place(items: list[Any], key: str) -> int:
    """The index of an item in a list, by number or by name."""
    return int(key) if key.isdigit() else [item.get("name") for item in items].index(key)
