"""Makes the golden files of spec/vectors/: the project's writer makes the files, golden.py their expected weights.

    python spec/make_vectors.py

Vectors are append-only: a change of an existing file's bytes is refused.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import golden_model
import golden_programs
import numpy as np
from blake3 import blake3
from golden import Described, Golden, assemble, clustered, coarser, dense, other_values, stream, uniform

import rkf
from rkf.file.archive import pack
from rkf.file.atomic import replacing
from rkf.file.container import files_of
from rkf.file.edit import edit
from rkf.file.sections import SectionWriter
from rkf.file.split import split
from rkf.file.values import write_values
from rkf.file.writer import Writer
from rkf.format import canonical, codec
from rkf.format.matrix import Affine, Alias, ClusteredMatrix, MatrixValues
from rkf.format.superblock import Superblock, parse_superblock

VECTORS = Path(__file__).parent / "vectors"

# The model files: name -> tensors.


def smallest() -> dict[str, Golden]:
    """The file of the spec's hexdump."""
    indices = np.array([[0, 1, 1], [1, 0, 2]], np.uint8)
    values = MatrixValues(np.array([[-0.5, 0.25, 1.0]], np.float32))
    return {"w": assemble((2, 3), indices, 2, values)}


def dense_dtypes() -> dict[str, Golden]:
    edges = {
        "bf16": np.array([0x0000, 0x8000, 0x0001, 0x7F7F, 0xFF7F, 0x3F80, 0x3F81], "<u2"),
        "f16": np.array([0x0000, 0x8000, 0x0001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C01], "<u2").view("<f2"),
        "f32": np.array([0x00000000, 0x80000000, 0x00000001, 0x007FFFFF, 0x7F7FFFFF, 0x3F800001], "<u4").view("<f4"),
    }
    shapes = {"bf16": (7, 3), "f16": (2, 3, 5), "f32": (2, 1, 3, 2)}
    named = {f"{dtype}.edges": dense("", bits.shape, dtype, bits) for dtype, bits in edges.items()}
    return named | {f"{dtype}.numbers": dense(dtype, shape, dtype) for dtype, shape in shapes.items()}


def widths() -> dict[str, Golden]:
    """Every width, with K that fill it and K that do not, for rows of odd length."""
    return {
        f"k{k:03}": clustered(f"k{k:03}", (5, 13), k) for k in (2, 3, 4, 5, 8, 16, 24, 32, 33, 64, 100, 128, 129, 256)
    }


def shapes() -> dict[str, Golden]:
    """One column, one row, lengths around whole bytes, stacks."""
    of = ((1, 1), (3, 1), (1, 65), (2, 7), (2, 8), (2, 9), (3, 63), (3, 64), (2, 3, 5), (2, 2, 2, 3))
    ks = (2, 6, 100)
    return {f"{'x'.join(map(str, shape))}.k{k}": clustered(f"{shape} {k}", shape, k) for shape in of for k in ks}


def affine() -> dict[str, Golden]:
    """Factors of every granularity, type and combination; the last group of a row is short, or longer than the row."""
    made = {}
    groups = [("group", group, columns) for group, columns in ((32, 70), (64, 70), (128, 129), (256, 70))]
    for granularity, group, columns in (("tensor", None, 9), ("row", None, 9), *groups):
        for a, b in (("f16", None), (None, "f32"), ("f32", "f16")):
            name = f"{granularity}{group or ''}.a-{a}.b-{b}".replace("None", "none")
            made[name] = clustered(name, (3, columns), 16, affine=(granularity, group, a, b))
    return made


def tables() -> dict[str, Golden]:
    """Several tables: one per row, one per expert of a stack, and a last one with fewer rows."""
    return {
        "expert": clustered("expert", (3, 4, 10), 32, rows_per_table=4),
        "row": clustered("row", (5, 6), 3, rows_per_table=1),
        "short": clustered("short", (7, 33), 16, rows_per_table=3, affine=("group", 32, "f16", "f16")),
    }


def exceptions() -> dict[str, Golden]:
    made = {dtype: clustered(dtype, (4, 33), 16, exceptions=(9, dtype)) for dtype in ("bf16", "f16", "f32")}
    made["one"] = clustered("one", (2, 4), 2, exceptions=(1, "f32"))
    made["with-affine"] = clustered(
        "with-affine", (4, 33), 24, affine=("row", None, "f32", "f32"), exceptions=(16, "f16")
    )
    return made


def rounding() -> dict[str, Golden]:
    """Weights that come out wrong with a fused multiply-add, flushed subnormals, or an absent factor set to 1 or 0."""
    third, tiny = np.float32(1) / np.float32(3), np.float32(1e-39)
    indices = np.arange(16, dtype=np.uint8).reshape(1, 16)
    centroids = np.sort(uniform("rounding", (1, 16), -1, 1), axis=1)
    near = np.float32(-1) * centroids[:, 8:9].reshape(1) * third
    fused = Affine("tensor", None, np.array([third]), near)
    small = np.sort(np.concatenate([-tiny * np.arange(1, 8), tiny * np.arange(9)]).astype(np.float32)).reshape(1, 16)
    shrunk = Affine("tensor", None, np.array([0.3], np.float32), None)
    zero = np.array([[-0.0, 1.0]], np.float32)
    return {
        "fused": assemble((1, 16), indices, 1, MatrixValues(centroids, fused)),
        "negative-a": assemble(
            (1, 16), indices & 1, 1, MatrixValues(zero, Affine("tensor", None, np.array([0.5], np.float32), None))
        ),
        "negative-zero": assemble((1, 16), indices & 1, 1, MatrixValues(zero)),
        "negative-zero-plus-b": assemble(
            (1, 16), indices & 1, 1, MatrixValues(zero, Affine("tensor", None, None, np.array([0.0], np.float32)))
        ),
        "subnormal": assemble((1, 16), indices, 1, MatrixValues(small, shrunk)),
    }


def progressive() -> dict[str, Golden]:
    """Everything that affects a prefix of the planes: tables, their counts, factors, exceptions, the order of sums."""
    ends = np.array(
        [-1, -1.5 * 2.0**-54, 2.0**-60, 1], np.float32
    )  # their sum is 0 from the left, -2^-53 from the right
    order = np.concatenate([ends, np.arange(2, 62, dtype=np.float32)]).reshape(1, 64)
    indices = np.arange(64, dtype=np.uint8).reshape(1, 64)
    return {
        "order-of-sums": assemble((1, 64), indices, 1, MatrixValues(order)),
        "tables": clustered(
            "progressive", (6, 70), 64, rows_per_table=2, affine=("group", 32, "f16", "f32"), exceptions=(7, "f32")
        ),
        "three-planes": clustered("three", (3, 40), 128, affine=("row", None, "f32", None), exceptions=(2, "bf16")),
    }


def names() -> dict[str, Golden]:
    """Names that sort differently in UTF-16, and one that begins with a byte order mark."""
    return {name: dense(name, (2,), "f32") for name in ("\ue000", "\ufeffw", "\uffee", "\U0001f600", "w")}


def negative_zero() -> dict[str, Golden]:
    """A group of centroids that is -0 alone: under a prefix of the planes it becomes +0."""
    centroids = np.array([[-4, -3, -2, -1, -0.0]], np.float32)
    indices = np.array([[0, 1, 2, 3, 4, 4, 4, 0]], np.uint8)
    return {"w": assemble((1, 8), indices, 1, MatrixValues(centroids))}


def everything() -> dict[str, Golden]:
    """All kinds of sections and tensors in a few KiB, for the mutations of the hostile tests."""
    norm = dense("norm", (5,), "bf16")
    head = clustered("head", (6, 35), 32, rows_per_table=4, affine=("group", 32, "f16", "f32"), exceptions=(4, "bf16"))
    return {
        "alias": Golden(Alias("head"), head.weights),
        "body": clustered("body", (2, 3, 7), 100, affine=("row", None, "f32", None)),
        "head": head,
        "norm": norm,
        "other-alias": Golden(Alias("norm"), norm.weights),
    }


def free() -> dict[str, Golden]:
    """A tensor whose directory is rewritten with everything that is allowed there and has no meaning."""
    return {"head": clustered("head", (2, 33), 5, affine=("group", 32, "f16", None), exceptions=(2, "f16"))}


def low_entropy() -> dict[str, Golden]:
    """A file that zstd makes smaller; its packed twin has the same weights."""
    made = {"noise": clustered("noise", (3, 40), 16, exceptions=(5, "f32"))}
    for name, shape, k in (("one-plane", (16, 64), 16), ("two-planes", (16, 100), 64), ("three-planes", (20, 65), 100)):
        indices = np.minimum(np.arange(shape[0] * shape[1]) % 97 // 9, k - 1).astype(np.uint8).reshape(shape)
        indices[shape[0] // 2] = k - 1
        centroids = np.sort(uniform(name, (1, k), -1, 1), axis=1)
        made[name] = assemble(shape, indices, shape[0], MatrixValues(centroids))
    return made | {"zeros": dense("zeros", (300,), "f16", np.zeros(300, "<f2"))}


def regrouped(matrix: ClusteredMatrix) -> Described:
    """Factors per group, exceptions in f32."""
    count = 0 if matrix.exceptions is None else len(matrix.exceptions.positions)
    return Described(("group", 32, "f32", "f16"), (count, "f32") if count else None)


def shuffled(matrix: ClusteredMatrix) -> Described:
    """Centroids in no order, no factors."""
    count = 0 if matrix.exceptions is None else len(matrix.exceptions.positions)
    return Described(None, (count, "bf16") if count else None, ordered=False)


MODELS: dict[str, Callable[[], dict[str, Golden]]] = {
    "affine.rkf": affine,
    "dense.rkf": dense_dtypes,
    "everything.rkf": everything,
    "exceptions.rkf": exceptions,
    "free.rkf": free,
    "low-entropy.rkf": low_entropy,
    **{name: partial(golden_model.tensors, name) for name in golden_model.MODELS},
    "names.rkf": names,
    "negative-zero.rkf": negative_zero,
    "progressive.rkf": progressive,
    "rounding.rkf": rounding,
    "shapes.rkf": shapes,
    "smallest.rkf": smallest,
    "tables.rkf": tables,
    "widths.rkf": widths,
    **{name: partial(golden_programs.tensors, name) for name in golden_programs.PROGRAMS},
}
# name -> model, whether centroids ascend, the form of the values
VALUES: dict[str, tuple[str, bool, Callable[[ClusteredMatrix], Described]]] = {
    "other.rkv": ("progressive.rkf", True, regrouped),
    "regrouped.rkv": ("everything.rkf", True, regrouped),
    "tuned.rkv": ("exceptions.rkf", True, regrouped),
    "unordered.rkv": ("tables.rkf", False, shuffled),
}
BLOBS = {
    "everything.rkf": {
        "chat_template.jinja": b"{% for message in messages %}{{ message['content'] }}{% endfor %}",
        "tokenizer.json": b'{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}',
    },
    **dict.fromkeys(golden_model.MODELS, golden_model.BLOBS),
    **dict.fromkeys(golden_programs.PROGRAMS, golden_programs.BLOBS),
}
METADATA = {
    **{name: {"model": model} for name, model in golden_model.MODELS.items()},
    **{name: {"model": golden_programs.metadata(program)} for name, program in golden_programs.PROGRAMS.items()},
}
# Models in parts -> the model, bytes of a part.
SPLIT = {"parts.rkf": ("everything.rkf", 1000), "parts-program.rkf": ("program-biased-head.rkf", 5000)}
PREFIXES = {
    "negative-zero.rkf": (1,),
    "progressive.rkf": (1, 2),
    "widths.rkf": (1, 2),
}  # planes that are also decoded alone
# Every form of canonical msgpack, in places whose contents are free.
FREE = {
    "as deep as may be": [[[[{}]]]],
    "binary": [bytes(n) for n in (0, 255, 256)],
    "booleans": [False, True],
    "floats": [0.0, 1.0, -0.1, 5e-324, 1.7976931348623157e308],
    "positive": [0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1],
    "negative": [-1, -32, -33, -128, -129, -32768, -32769, -(2**31), -(2**31) - 1, -(2**63)],
    "lists": [[], list(range(15)), list(range(16))],
    "maps": [{}, {f"{n:02}": n for n in range(15)}, {f"{n:02}": n for n in range(16)}],
    "strings": ["", "s" * 31, "s" * 32, "s" * 255, "s" * 256, "\u00e9\u4e2d\U0001f600", "\x1b[31m"],
    "sorted by bytes": {"B": 1, "a": 2, "\u00e9": 3, "\ue000": 4, "\U0001f600": 5},
}


def free_directory(directory: dict[str, Any]) -> None:
    """Free metadata and ignored keys, in every map where they may stand."""
    directory["metadata"]["x-free"] = directory["provenance"]["free"] = FREE
    tensor = directory["tensors"][0]
    values = tensor["values"]
    for entry in (directory, directory["sections"][0], tensor, values, values["affine"], tensor["exceptions"]):
        entry["x-note"] = "ignored"
    tensor["stats"] = {"error": 0.125, "weights": 66}


def make(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Write every vector into an empty folder and return the manifest."""
    made = {name: tensors() for name, tensors in MODELS.items()}
    entries = []
    for name, model in made.items():
        write_model(folder / name, model)
        entries.append(expect(folder, name, model))
        for planes in PREFIXES.get(name, ()):
            entries.append(expect(folder, name, prefix(model, planes), planes=planes))
    for name, (model, ordered, how) in VALUES.items():
        tuned = other_values(made[model], name, how)
        write_tuned(folder / name, folder / model, tuned, ordered)
        entries.append(expect(folder, model, tuned, values=name))
        if model in PREFIXES:
            entries.append(expect(folder, model, prefix(tuned, 1), values=name, planes=1))
    for name, (source, store) in PACKED.items():
        store(folder / source, folder / name)
        entries.append(expect(folder, name, made[source]))
    for name, (source, part_bytes) in SPLIT.items():
        split(folder / source, folder / name, part_bytes=part_bytes)
        parts = [path.name for path in files_of(folder / name)[1:]]
        entries.append({**expect(folder, name, made[source]), "parts": parts})
    return {
        "logits": make_logits(folder, made),
        "refused": [mismatching(folder, made["tables.rkf"])],
        "vectors": sorted(entries, key=lambda entry: entry["expected"]),
    }


def mismatching(folder: Path, tables: Mapping[str, Golden]) -> dict[str, Any]:
    """Write a values file for a model with other ranks than `tables.rkf`, but the same names and sizes. The manifest's
    entry.
    """
    other = {
        name: clustered(f"other {name}", matrix.shape, matrix.k, rows_per_table=matrix.rows_per_table)
        for name, golden in tables.items()
        if isinstance(matrix := golden.tensor, ClusteredMatrix)
    }
    with tempfile.TemporaryDirectory() as apart:
        model = Path(apart, "tables.rkf")
        write_model(model, other)
        write_tuned(folder / "mismatching.rkv", model, other, ordered=True)
    return {"file": "tables.rkf", "level": "binding", "values": "mismatching.rkv"}


def make_logits(folder: Path, made: Mapping[str, Mapping[str, Golden]]) -> list[dict[str, Any]]:
    """Write a file with the logits of every model and return the entries of the manifest."""
    tokens = golden_model.TOKENS
    files = {f"{name.removesuffix('.rkf')}.logits.json": name for name in golden_model.MODELS}
    texts: dict[str, dict[str, Any]] = {
        name: {"tokens": tokens, "logits": golden_model.logits(file, made[file], tokens).round(12).tolist()}
        for name, file in files.items()
    }
    texts |= {name: golden_programs.logits(folder, name) for name in golden_programs.LOGITS}
    files |= {name: file for name, (file, _) in golden_programs.LOGITS.items()}
    for name, text in texts.items():
        (folder / name).write_text(json.dumps(text) + "\n")
    return [{"file": files[name], "logits": name} for name in sorted(files)]


def prefix(model: Mapping[str, Golden], planes: int) -> dict[str, Golden]:
    return {name: coarser(golden, planes) for name, golden in model.items()}


def write_model(path: Path, model: Mapping[str, Golden]) -> None:
    with Writer(path, metadata=METADATA.get(path.name, {}), provenance={}) as writer:
        for name, golden in sorted(model.items()):
            writer.add(name, golden.tensor)
        for name, data in BLOBS.get(path.name, {}).items():
            writer.blob(name, data)
    store_raw(path)
    if path.name == "free.rkf":
        rewrite_directory(path, free_directory)


def write_tuned(path: Path, model: Path, tuned: Mapping[str, Golden], ordered: bool) -> None:
    values = {
        name: golden.tensor.values for name, golden in tuned.items() if isinstance(golden.tensor, ClusteredMatrix)
    }
    with rkf.open(model) as container:
        write_values(path, container, values, ordered=ordered)


def store_raw(path: Path) -> None:
    """Store the blobs raw too, so that a reader without zstd has vectors with blobs, and their bytes never change."""
    with rkf.open(path) as container, replacing(path, force=True) as out:
        writer = SectionWriter(out)
        for number, section in enumerate(container.sections):
            writer.add(section.kind, [container.section(number)], section.name)
        writer.finish(container.directory.raw, container.kind)


def store_zstd(source: Path, target: Path) -> None:
    """A copy with every section compressed, including those that `pack` leaves raw."""
    with rkf.open(source) as container, replacing(target) as out:
        writer = SectionWriter(out)
        for number, section in enumerate(container.sections):
            data = container.stored(number)
            writer.add_zstd(section.kind, map(codec.compress_chunk, codec.chunks(data)), section.length, section.hash)
            writer.sections[-1].update({} if section.name is None else {"name": section.name})
        writer.finish(container.directory.raw, container.kind)


def store_two_chunks(source: Path, target: Path) -> None:
    """A copy with a blob that is longer than a chunk. Zeros alone would shrink further than readers accept."""
    noise = stream("two chunks", 20000).tobytes()
    edit(source, output=target, blobs={"x-two-chunks": bytes(codec.ZSTD_CHUNK_BYTES - 40000) + noise})


def rewrite_directory(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the directory and recompute the hashes, for contents that the writer never makes."""
    data = path.read_bytes()
    superblock = parse_superblock(data)
    directory = canonical.decode(data[superblock.directory_offset :])
    change(directory)
    packed = canonical.encode(directory)
    start, end = superblock.directory_offset, superblock.directory_offset + len(packed)
    head = Superblock(superblock.kind, start, len(packed), end, blake3(packed).digest()).encode()
    path.write_bytes(head + data[len(head) : start] + packed)


def expect(folder: Path, file: str, model: Mapping[str, Golden], **how: Any) -> dict[str, Any]:
    """Write the weights of all tensors in order as little-endian f32; the manifest's entry."""
    parts = [how.get("values", file).rsplit(".", 1)[0], *(f"{how[key]}-{key}" for key in ("planes",) if key in how)]
    expected = ".".join(parts) + ".f32"
    tensors, offset = [], 0
    for name, golden in sorted(model.items()):
        tensors.append({"name": name, "shape": list(golden.weights.shape), "offset": offset})
        offset += golden.weights.nbytes
    weights = b"".join(golden.weights.astype("<f4").tobytes() for _, golden in sorted(model.items()))
    (folder / expected).write_bytes(weights)
    return {"expected": expected, "file": file, **how, "tensors": tensors}


# Made once and kept: zstd's version and level decide the bytes of a frame, and frames of equal content are all valid.
PACKED: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "packed.rkf": ("low-entropy.rkf", pack),
    "two-chunks.rkf": ("smallest.rkf", store_two_chunks),
    "zstd.rkf": ("everything.rkf", store_zstd),
}


def changed(made: Path, kept: Path) -> list[str]:
    """Files of `kept` that are missing from `made` or have other bytes there, except packed ones."""
    old = {path.name for path in kept.iterdir() if path.suffix in (".rkf", ".rkv", ".f32")} - PACKED.keys()
    same = (name for name in old if (made / name).exists() and (made / name).read_bytes() == (kept / name).read_bytes())
    return sorted(old - set(same))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        manifest = make(Path(folder))
        different = changed(Path(folder), VECTORS)
        if different:
            print(f"refused: {', '.join(different)} would change; vectors are append-only")
            return 1
        for path in Path(folder).iterdir():
            if not (VECTORS / path.name).exists():
                (VECTORS / path.name).write_bytes(path.read_bytes())
    (VECTORS / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
