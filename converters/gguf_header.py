"""The header of a GGUF file: fields and tensor directory, with every count checked against the remaining bytes.

Knows the layout of GGUF 2 and 3 (ggml's docs/gguf.md and src/gguf.cpp, whose refusals are these) and the meaning of no
field. gguf-py's reader does the same, but takes 3.2 s for the header of a 135 M model (this: 0.2 s), loops for ever
over a forged array length, and accepts tensors that lie over each other.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from rkf.converters.input_files import read_values, refuse_pointer
from rkf.errors import NotRkfError, SourceError
from rkf.file.mapped import mapped
from rkf.format.constants import MAGIC as RKF_MAGIC

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS, MAX_NAME_BYTES = 4, 63
_ALIGNMENT = "general.alignment"

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_DTYPES = {kind: np.dtype(code) for kind, code in _SCALARS.items()}
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the directory. shape: output-major. offset: in the file."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    @property
    def stored_bytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes

    def stored(self, path: Path, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """The bytes of rows start … stop - 1 as they lie in the file, `u8[rows, row_bytes]`."""
        count = (prod(self.shape[:-1]) if stop is None else stop) - start
        data = read_values(path, np.dtype(np.uint8), count * self.row_bytes, self.offset + start * self.row_bytes)
        return data.reshape(-1, self.row_bytes)


@dataclass(frozen=True, slots=True)
class GgufTexts:
    """An array of strings, decoded only when it is read: 5 million of them take ten times their bytes in memory."""

    data: bytes = field(repr=False)
    count: int
    where: str

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        """SourceError for one that is not UTF-8."""
        at = 0
        for number in range(self.count):
            (length,) = _U64.unpack_from(self.data, at)
            at += 8 + length
            try:
                yield str(self.data[at - length : at], "utf-8")
            except UnicodeDecodeError as error:
                raise SourceError(f"{self.where}: string {number} of an array is not UTF-8") from error


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """fields: key -> int, float, bool, str, GgufTexts or a numpy array. tensors: in file order."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """Read and check the header.

    Raises NotRkfError (not GGUF at all) or SourceError: big-endian, an unknown version or type, or counts and sizes
    that do not fit the file.
    """
    refuse_pointer(path)
    with path.open("rb") as file:
        _check_start(file.read(8), path)
        with mapped(file.fileno(), path) as data:
            return _parse(_Cursor(data, path), path)


def _parse(cursor: _Cursor, path: Path) -> GgufHeader:
    tensor_count, field_count = cursor.number("<u8"), cursor.number("<u8")
    # The shortest field takes 13 bytes (empty key, one byte), the shortest tensor 32.
    cursor.expect(13 * field_count, "fields")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.string()
        if not key or key in fields:
            raise SourceError(f"{path}: field {key!r} occurs twice" if key else f"{path}: a field has no name")
        kind = cursor.kind()
        fields[key] = cursor.value(kind)
        if key == _ALIGNMENT and kind != GGUFValueType.UINT32:
            raise SourceError(f"{path}: {key}: expected type UINT32, got {kind.name}")
    cursor.expect(32 * tensor_count, "tensors")
    entries = [cursor.tensor_entry() for _ in range(tensor_count)]
    return GgufHeader(fields, _tensors(entries, cursor, fields, path))


def _check_start(start: bytes, path: Path) -> None:
    if start == RKF_MAGIC:
        raise NotRkfError(f"{path}: an rkf file already; give what it was converted from, or `rkf export` it first")
    if start[:4] != MAGIC:
        raise NotRkfError(f"{path}: neither a Hugging Face folder nor GGUF (the file begins with {start[:4]!r})")
    if len(start) < 8:
        raise SourceError(f"{path}: the file ends after {len(start)} bytes")
    version = int.from_bytes(start[4:], "little")
    if version & 0xFFFF == 0:
        raise SourceError(f"{path}: big-endian GGUF is not supported; convert it with gguf-py's gguf_convert_endian.py")
    if version not in VERSIONS:
        raise SourceError(f"{path}: GGUF version {version} is not supported; expected 2 or 3")


class _Cursor:
    """Reads the header forwards; checks the remaining bytes before it reads any."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.offset = data, path, 8

    def expect(self, length: int, what: str) -> None:
        if length > len(self.data) - self.offset:
            raise SourceError(
                f"{self.path}: {what} at byte {self.offset}: expected at least {length} bytes, "
                f"{len(self.data) - self.offset} remain; the file is truncated or damaged"
            )

    def take(self, length: int, what: str) -> bytes:
        self.expect(length, what)
        self.offset += length
        return self.data[self.offset - length : self.offset]

    def number(self, code: str) -> Any:
        dtype = np.dtype(code)
        return np.frombuffer(self.take(dtype.itemsize, "a number"), dtype)[0].item()

    def string(self) -> str:
        (length,) = _U64.unpack(self.take(8, "the length of a string"))
        raw = self.take(length, "a string")
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.path}: a string at byte {self.offset - length} is not UTF-8") from error

    def kind(self) -> GGUFValueType:
        code = self.number("<u4")
        try:
            return GGUFValueType(code)
        except ValueError as error:
            raise SourceError(f"{self.path}: unknown field type {code} at byte {self.offset - 4}") from error

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind])
        item, count = self.kind(), self.number("<u8")
        if item == GGUFValueType.ARRAY:
            raise SourceError(f"{self.path}: an array of arrays at byte {self.offset} is not supported")
        if item == GGUFValueType.STRING:
            return self.texts(count)
        return np.frombuffer(self.take(count * _DTYPES[item].itemsize, "an array"), _DTYPES[item])

    def texts(self, count: int) -> GgufTexts:
        self.expect(8 * count, "strings")
        start = end = self.offset
        for _ in range(count):
            self.expect(end + 8 - start, "strings")
            end += 8 + _U64.unpack_from(self.data, end)[0]
        return GgufTexts(self.take(end - start, "strings"), count, str(self.path))

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, output-major shape, type code, offset in the data."""
        name, dimensions = self.string(), self.number("<u4")
        if len(name.encode()) > MAX_NAME_BYTES:
            raise SourceError(f"{self.path}: tensor {name[:80]}: a name of more than {MAX_NAME_BYTES} bytes")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise SourceError(f"{self.path}: tensor {name}: {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
        shape = tuple(self.number("<u8") for _ in range(dimensions))[::-1]
        return name, shape, self.number("<u4"), self.number("<u8")


def _tensors(
    entries: list[tuple[str, tuple[int, ...], int, int]], cursor: _Cursor, fields: Mapping[str, Any], path: Path
) -> dict[str, GgufTensor]:
    """The directory. As in ggml, each tensor begins at the first aligned byte after the one before it."""
    alignment = fields.get(_ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
    if alignment < 1 or alignment & (alignment - 1):
        raise SourceError(f"{path}: {_ALIGNMENT} {alignment} is not a power of two")
    start = -(-cursor.offset // alignment) * alignment
    end = 0
    tensors: dict[str, GgufTensor] = {}
    for name, shape, code, offset in entries:
        if name in tensors:
            raise SourceError(f"{path}: tensor {name} occurs twice")
        kind, row_bytes = _layout(name, shape, code, path)
        tensor = GgufTensor(name, kind, shape, start + offset, row_bytes)
        if offset != end:
            raise SourceError(f"{path}: tensor {name}: expected offset {end}, after the tensor before it, got {offset}")
        end = -(-(end + tensor.stored_bytes) // alignment) * alignment
        if tensor.offset + tensor.stored_bytes > len(cursor.data):
            raise SourceError(
                f"{path}: tensor {name}: {tensor.stored_bytes} bytes at {tensor.offset} end past the file "
                f"({len(cursor.data)} bytes); it is truncated or damaged"
            )
        tensors[name] = tensor
    return tensors


def _layout(name: str, shape: tuple[int, ...], code: int, path: Path) -> tuple[GGMLQuantizationType, int]:
    """The type and the bytes of one row."""
    try:
        kind = GGMLQuantizationType(code)
    except ValueError as error:
        raise SourceError(f"{path}: tensor {name}: unknown tensor type {code}") from error
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise SourceError(f"{path}: tensor {name}: shape {list(shape)} is not whole {kind.name} blocks of {block}")
    return kind, shape[-1] // block * block_bytes
