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
        self._out = out
        self.sections: list[dict[str, Any]] = []
        out.write(bytes(SUPERBLOCK_BYTES))  # zeros mark an incomplete file until the very end

    def add(self, kind: str, pieces: Iterable[Any], name: str | None = None) -> int:
        """Append a raw section made of consecutive buffers. The section's number."""
        self._align()
        offset, digest = self._out.position, blake3()
        for piece in pieces:
            view = memoryview(piece).cast("B")
            digest.update(view)
            self._out.write(view)
        return self._record(kind, CODEC_RAW, offset, digest.digest(), name)

    def add_zstd(
        self, kind: str, frames: Iterable[Any], decoded_length: int, decoded_hash: bytes, name: str | None = None
    ) -> int:
        """Append a section of zstd frames, one per chunk. The section's number."""
        self._align()
        offset, digest, lengths = self._out.position, blake3(), []
        for frame in frames:
            digest.update(frame)
            self._out.write(frame)
            lengths.append(len(frame))
        number = self._record(kind, CODEC_ZSTD, offset, decoded_hash, name)
        packed = {"chunks": lengths, "decoded_length": decoded_length, "stored_hash": digest.digest()}
        self.sections[number].update(packed)
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
        self._align()
        data = canonical.encode({**directory, "sections": self.sections})
        offset = self._out.position
        end = offset + len(data)
        model = directory["metadata"].get("model")
        carries = kind == KIND_MODEL and isinstance(model, dict) and "program" in model
        required = FEATURE_PROGRAM if carries else 0
        superblock = Superblock(kind, offset, len(data), end, blake3(data).digest(), minor, required, optional)
        read_model(parse_directory(data, superblock), superblock)
        self._out.write(data)
        self._out.overwrite_start(superblock.encode())

    def _align(self) -> None:
        self._out.write(bytes(aligned(self._out.position) - self._out.position))

    def _record(self, kind: str, codec: str, offset: int, digest: bytes, name: str | None) -> int:
        section = {
            "codec": codec,
            "hash": digest,
            "kind": kind,
            "length": self._out.position - offset,
            "offset": offset,
        }
        self.sections.append(section if name is None else {**section, "name": name})
        return len(self.sections) - 1
