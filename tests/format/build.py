"""Inputs of the format's tests: random matrices, a tiny model, a file with recomputed hashes after a change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from blake3 import blake3
from hypothesis import strategies as st

from rkf.file.writer import Writer
from rkf.format import bitpack, canonical
from rkf.format.constants import (
    ALIGNMENT,
    GROUP_SIZES,
    SUPERBLOCK,
    SUPERBLOCK_BYTES,
    SUPERBLOCK_HASHED_BYTES,
    index_bits,
    position_bytes,
)
from rkf.format.directory import dense_id, ranks_id
from rkf.format.matrix import Affine, Alias, ClusteredMatrix, DenseTensor, Exceptions, Tensor, from_f32, storage_dtype
from rkf.model.first_form import ModelConfig
from tests.format.first_form_metadata import metadata_of, shapes_of

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=6,
    context_length=64,
    norm_epsilon=1e-5,
    rope_theta=10000.0,
    bos_id=1,
    eos_ids=(2,),
    add_bos=True,
    generation={"temperature": 0.6},
)
TOKENIZER = json.dumps({"model": {"vocab": {f"t{i}": i for i in range(39)}}, "added_tokens": [{"id": 39}]}).encode()
BLOBS = {"chat_template.jinja": b"{{ messages }}", "tokenizer.json": TOKENIZER}


def clustered(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    k: int,
    *,
    rows_per_table: int | None = None,
    affine: Affine | None = None,
    exceptions: int = 0,
    dtype: str = "bf16",
) -> ClusteredMatrix:
    """A matrix with random ranks and values."""
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    rows_per_table = rows_per_table or rows
    tables = -(-rows // rows_per_table)
    indices = rng.integers(0, k, (rows, columns), dtype=np.uint8)
    counts = np.zeros((tables, k), np.uint64)
    np.add.at(counts, (np.arange(rows)[:, None] // rows_per_table, indices), 1)
    centroids = np.cumsum(rng.uniform(0.01, 1, (tables, k)), axis=1).astype(np.float32) - np.float32(k / 4)
    overrides = None
    if exceptions:
        positions = np.sort(rng.choice(rows * columns, exceptions, replace=False))
        values = from_f32(rng.standard_normal(exceptions).astype(np.float32), dtype)
        overrides = Exceptions(positions.astype(f"<u{position_bytes(rows * columns)}"), values, dtype)
    planes = bitpack.pack(indices, index_bits(k))
    return ClusteredMatrix(shape, planes, counts, centroids, rows_per_table, "bf16", affine, overrides)


def affine(rng: np.random.Generator, rows: int, columns: int, granularity: str, **factors: str) -> Affine:
    """Random factors. factors: a="f16", b="f32"; granularity "group 64" includes its size."""
    kind, _, group = granularity.partition(" ")
    size = {"tensor": (1,), "row": (rows,)}.get(kind) or (rows, -(-columns // int(group)))
    arrays = {key: rng.uniform(0.5, 2, size).astype(storage_dtype(dtype)) for key, dtype in factors.items()}
    return Affine(kind, int(group) if group else None, arrays.get("a"), arrays.get("b"))


@st.composite
def matrices(draw: st.DrawFn) -> ClusteredMatrix:
    """Every width, 2-D to 4-D, odd shapes, tables, granularities, exceptions."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    shape = (*draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)), draw(st.integers(1, 140)))
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    granularity = draw(st.sampled_from((None, "tensor", "row", *(f"group {size}" for size in GROUP_SIZES))))
    keys = draw(st.sampled_from(("a", "b", "ab")))
    factors = {key: draw(st.sampled_from(("f16", "f32"))) for key in keys}
    return clustered(
        rng,
        shape,
        draw(st.integers(2, 256)),
        rows_per_table=draw(st.integers(1, rows)),
        affine=affine(rng, rows, columns, granularity, **factors) if granularity else None,
        exceptions=draw(st.integers(0, rows * columns // 8)),
        dtype=draw(st.sampled_from(("bf16", "f16", "f32"))),
    )


def model_tensors(seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors of CONFIG: matrices clustered in turn by all granularities, the rest dense, the head tied."""
    rng = np.random.default_rng(seed)
    shapes = shapes_of(CONFIG, optional=False)
    for number, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        if name == "lm_head.weight":
            yield name, Alias("model.embed_tokens.weight")
        elif len(shape) == 1:
            yield name, DenseTensor("f32", rng.uniform(0.5, 1, shape).astype("<f4"))
        else:
            kind = (None, "tensor", "row", "group 32")[number % 4]
            factors = affine(rng, *shape, kind, a="f16", b="f32") if kind else None
            k = (16, 24, 64, 5)[number % 4]
            yield name, clustered(rng, shape, k, rows_per_table=7, affine=factors, exceptions=3 * (number % 2))


def write_model(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A whole tiny model; changes: other metadata, provenance, blobs, force."""
    options = {"metadata": {"model": metadata_of(CONFIG)}, "provenance": {"source": "random"}, **changes}
    blobs = options.pop("blobs", BLOBS)
    with Writer(path, **options) as writer:
        for name, tensor in model_tensors(seed):
            writer.add(name, tensor, None if isinstance(tensor, Alias) else {"error": 0.25})
        for name, data in blobs.items():
            writer.blob(name, data)
    return path


def directory_of(data: bytes) -> dict[str, Any]:
    """The directory of a file, unchecked."""
    return canonical.decode(data[SUPERBLOCK.unpack_from(data)[6] :])


def resealed(data: bytes, change: Callable[[Any], Any]) -> bytes:
    """The file with `change` applied to its directory and all hashes above it recomputed.

    change edits the directory in place, or returns its replacement (a value, or the bytes themselves).
    """
    fields = list(SUPERBLOCK.unpack_from(data))
    offset, directory = fields[6], directory_of(data)
    changed = change(directory)
    packed = changed if isinstance(changed, bytes) else canonical.encode(directory if changed is None else changed)
    fields[7:10] = len(packed), offset + len(packed), blake3(packed).digest()
    return with_superblock(data[:offset] + packed, fields)


def with_superblock(data: bytes, fields: list[Any]) -> bytes:
    """The file with these superblock fields and the superblock's hash recomputed."""
    head = SUPERBLOCK.pack(*fields)[:SUPERBLOCK_HASHED_BYTES]
    return head + blake3(head).digest() + data[SUPERBLOCK_BYTES:]


def packed_section(data: bytes, number: int) -> bytes:
    """The file with a raw section stored as zstd."""
    section = directory_of(data)["sections"][number]
    stored = data[section["offset"] : section["offset"] + section["length"]]
    more = {"codec": "zstd", "decoded_length": len(stored), "chunks": []}
    return with_section(data, number, zstandard.compress(stored), **more)


def with_section(data: bytes, number: int, stored: bytes, **changes: Any) -> bytes:
    """The file with other stored bytes in a section of one chunk; later sections move, all hashes are recomputed."""
    directory = directory_of(data)
    directory["sections"][number] |= changes
    pieces = [data[s["offset"] : s["offset"] + s["length"]] for s in directory["sections"]]
    pieces[number] = stored
    body = bytearray(data[:SUPERBLOCK_BYTES])
    for section, piece in zip(directory["sections"], pieces, strict=True):
        section |= {"offset": len(body), "length": len(piece)}
        body += piece + bytes(-len(piece) % ALIGNMENT)
    section = directory["sections"][number]
    if section["codec"] == "zstd":
        section |= {"chunks": [len(stored)], "stored_hash": blake3(stored).digest()}
    else:
        section["hash"] = blake3(stored).digest()
    fields = list(SUPERBLOCK.unpack_from(data))
    fields[6] = len(body)
    return resealed(with_superblock(bytes(body), fields) + canonical.encode(directory), with_identities)


def with_identities(directory: dict[str, Any]) -> dict[str, Any]:
    """The directory with the ids that match its hashes."""
    tensors, sections = directory["tensors"], directory["sections"]
    return {**directory, "ranks_id": ranks_id(tensors, sections), "dense_id": dense_id(tensors, sections)}
