"""Appends sections to an output file and seals it. Knows the layout of a file, not the contents of sections.

The superblock stays zero until everything else is written. The directory must pass the reader's checks first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from blake3 import blake3

from rkf.file.atomic import OutputFile
from rkf.format import canonical, codec
from rkf.format.constants import CODEC_RAW, CODEC_ZSTD, FEATURE_PROGRAM, KIND_MODEL, MINOR, SUPERBLOCK_BYTES, aligned
from rkf.format.directory import parse_directory
from rkf.format.superblock import Superblock
from rkf.model.expected import read_model


class SectionWriter:
    """Writes a file front to back: `add` sections in order, then `finish`."""

    def __init__(self, out: OutputFile) -> None:
        self._out = out  # gets the directory
        self._body = out  # gets sections
        self._required = 0  # feature bits
        self.sections: list[dict[str, Any]] = []
        out.write(bytes(SUPERBLOCK_BYTES))  # zeros mark an incomplete file until the very end

    def add(self, kind: str, pieces: Iterable[Any], name: str | None = None) -> int:
        """Append a raw section made of consecutive buffers. The section's number."""
        return self._append(kind, CODEC_RAW, [memoryview(piece).cast("B") for piece in pieces], name)

    def add_zstd(
        self, kind: str, frames: Iterable[Any], decoded_length: int, decoded_hash: bytes, name: str | None = None
    ) -> int:
        """Append a section of zstd frames, one per chunk. The section's number."""
        stored = [memoryview(frame) for frame in frames]
        number = self._append(kind, CODEC_ZSTD, stored, name)
        section = self.sections[number]
        section.update({"stored_hash": section["hash"], "hash": decoded_hash})
        section.update({"chunks": [len(frame) for frame in stored], "decoded_length": decoded_length})
        return number

    def add_blob(self, name: str, data: bytes) -> int:
        """Append a blob, compressed if that makes it smaller. The section's number.

        Blobs are text and read once, at the start. A tokenizer in JSON is a fiftieth of a small model, and a third of
        that compressed.
        """
        frames = codec.compressed_blob(data)
        if frames is None:
            return self.add("blob", [data], name)
        return self.add_zstd("blob", frames, len(data), blake3(data).digest(), name)

    def copy(self, source: int, sections: Sequence[Mapping[str, Any]]) -> None:
        """Copy the first sections of an open file, bytes and records, before any other is added."""
        end = sections[-1]["offset"] + sections[-1]["length"] if sections else self._out.position
        self._out.copy(source, self._out.position, end - self._out.position)
        self.sections = [dict(section) for section in sections]

    def finish(self, directory: Mapping[str, Any], kind: int, minor: int = MINOR, optional: int = 0) -> None:
        """Write the directory (its sections are added here) and, last, the superblock."""
        align(self._out)
        model = directory["metadata"].get("model")
        carries = kind == KIND_MODEL and isinstance(model, dict) and "program" in model
        required = self._required | (FEATURE_PROGRAM if carries else 0)
        content = {**directory, "sections": self.sections}
        data, superblock = sealed(self._out, content, kind, required, minor, optional)
        read_model(parse_directory(data, superblock), superblock)
        self._out.write(data)
        self._out.overwrite_start(superblock.encode())

    def _append(self, kind: str, codec: str, pieces: Sequence[memoryview], name: str | None) -> int:
        """Write a section's stored bytes and record it, with their hash. Its number."""
        length, digest = sum(map(len, pieces)), blake3()
        offset = self._begin(length)
        for piece in pieces:
            digest.update(piece)
            self._body.write(piece)
        section = {"codec": codec, "hash": digest.digest(), "kind": kind, "length": length, "offset": offset}
        self.sections.append(section if name is None else {**section, "name": name})
        return len(self.sections) - 1

    def _begin(self, length: int) -> int:
        """Make ready for a section of `length` bytes. Its offset in the whole file."""
        align(self._body)
        return self._body.position


def align(out: OutputFile) -> None:
    """Write zeros up to where a section or a directory may begin."""
    out.write(bytes(aligned(out.position) - out.position))


def sealed(
    out: OutputFile, directory: Mapping[str, Any], kind: int, required: int, minor: int = MINOR, optional: int = 0
) -> tuple[bytes, Superblock]:
    """The bytes of a directory that ends `out`, and the superblock that goes with them."""
    data = canonical.encode(directory)
    offset, digest = out.position, blake3(data).digest()
    return data, Superblock(kind, offset, len(data), offset + len(data), digest, minor, required, optional)
