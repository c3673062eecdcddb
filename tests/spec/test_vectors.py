"""Every vector decodes to its exact bits, by the reference reader and by the project's."""

from __future__ import annotations

import ast
import json
import re
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import rkf
from rkf.errors import BindingError
from rkf.file.prefix import coarser
from rkf.format.constants import plane_bits
from rkf.format.matrix import ClusteredMatrix
from rkf.runtime.backend import Row
from rkf.runtime.cpu import CpuBackend
from tests.spec import reference
from tests.spec.document import SPEC, VECTORS

MANIFEST: dict[str, list[dict[str, Any]]] = json.loads((VECTORS / "manifest.json").read_text())
ENTRIES = MANIFEST["vectors"]
WHOLE = [entry for entry in ENTRIES if "planes" not in entry]
# The vectors that must be there, whatever the manifest says.
NAMES = """
affine dense everything exceptions free low-entropy model model-band model-linear names negative-zero
negative-zero.1-planes other other.1-planes packed parts parts-program
program-biased-head program-chunks program-experts program-latent program-plain program-post-norms
program-recurrent program-rotated program-scan program-windows
progressive progressive.1-planes progressive.2-planes
regrouped rounding shapes smallest tables tuned two-chunks unordered widths widths.1-planes widths.2-planes
zstd
"""
LOGITS = """
model-band model-linear model program-biased-head program-chunks program-experts program-latent program-plain
program-post-norms program-recurrent program-rotated program-scan program-windows program-windows.long
"""


def bits(entry: dict[str, Any], tensor: dict[str, Any]) -> NDArray[np.uint32]:
    """The expected weights of a tensor, as bits, `u32[shape]`."""
    data = (VECTORS / entry["expected"]).read_bytes()
    shape = tensor["shape"]
    return np.frombuffer(data, "<u4", prod(shape), tensor["offset"]).reshape(shape)


def same_bits(weights: NDArray[np.float32], expected: NDArray[np.uint32]) -> bool:
    return weights.dtype == np.float32 and np.array_equal(np.ascontiguousarray(weights).view(np.uint32), expected)


def test_manifest_is_complete() -> None:
    assert sorted(entry["expected"].removesuffix(".f32") for entry in ENTRIES) == NAMES.split()
    assert [entry["logits"].removesuffix(".logits.json") for entry in MANIFEST["logits"]] == LOGITS.split()
    keys = ("expected", "file", "values", "logits")
    entries = ENTRIES + MANIFEST["logits"] + MANIFEST["refused"]
    named = {entry[key] for entry in entries for key in keys if key in entry}
    named |= {part for entry in ENTRIES for part in entry.get("parts", ())}
    assert named == {path.name for path in VECTORS.iterdir()} - {"README.md", "manifest.json"}
    for entry in ENTRIES:
        last = entry["tensors"][-1]
        assert (VECTORS / entry["expected"]).stat().st_size == last["offset"] + 4 * prod(last["shape"])


@pytest.mark.parametrize("entry", WHOLE, ids=lambda entry: entry["expected"])
def test_both_readers(entry: dict[str, Any], tmp_path: Path) -> None:
    file = VECTORS / entry["file"]
    values = VECTORS / entry["values"] if "values" in entry else None
    whole = file
    if "parts" in entry:
        whole = tmp_path / file.name
        whole.write_bytes(reference.join(file))
    read = reference.read(whole, values)
    assert list(read) and set(read) == {tensor["name"] for tensor in entry["tensors"]}
    with rkf.open(file, values=values) as container:
        assert list(container.tensors) == [tensor["name"] for tensor in entry["tensors"]]
        for tensor in entry["tensors"]:
            expected = bits(entry, tensor)
            assert same_bits(read[tensor["name"]], expected), f"reference reader: {tensor['name']}"
            assert same_bits(container.decode(tensor["name"]), expected), f"rkf: {tensor['name']}"


@pytest.mark.parametrize("entry", MANIFEST["refused"], ids=lambda entry: entry["values"])
def test_pairs_that_do_not_fit(entry: dict[str, Any]) -> None:
    file, values = VECTORS / entry["file"], VECTORS / entry["values"]
    rkf.open(values).close()
    with pytest.raises(BindingError):
        rkf.open(file, values=values)
    with pytest.raises(reference.Refused) as refused:
        reference.read(file, values)
    assert refused.value.args[0] == entry["level"] == "binding"


def test_the_middle_band_and_the_chunks_are_there() -> None:
    """The vectors have what they are for."""
    with rkf.open(VECTORS / "model-band.rkf") as container:
        assert container.model is not None
        (rope,) = container.model.program.ropes
        assert 1 / 8 < rope.frequencies[0] < 1  # neither kept nor divided by the factor
    with rkf.open(VECTORS / "two-chunks.rkf") as container:
        (blob,) = (section for section in container.sections if section.kind == "blob")
        assert len(blob.chunks) == 2
    whole, prefix = (np.fromfile(VECTORS / f"negative-zero{name}.f32", "<u4")[4] for name in ("", ".1-planes"))
    assert (whole, prefix) == (0x80000000, 0)


@pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if "planes" in entry], ids=lambda entry: entry["expected"]
)
def test_prefixes_of_the_planes(entry: dict[str, Any]) -> None:
    values = VECTORS / entry["values"] if "values" in entry else None
    read = reference.read(VECTORS / entry["file"], values, planes=entry["planes"])
    with rkf.open(VECTORS / entry["file"], values=values) as container:
        for tensor in entry["tensors"]:
            matrix = container.load(tensor["name"])
            assert isinstance(matrix, ClusteredMatrix)
            prefix = coarser(matrix, entry["planes"])
            assert prefix.planes == matrix.planes[: entry["planes"]] and prefix.bits == sum(
                plane_bits(matrix.bits)[: entry["planes"]]
            )
            assert (prefix.counts.sum(axis=1) == matrix.counts.sum(axis=1)).all()
            assert same_bits(prefix.decode(), bits(entry, tensor)), tensor["name"]
            assert same_bits(read[tensor["name"]], bits(entry, tensor)), f"reference reader: {tensor['name']}"


def logits_of(backend: CpuBackend, expected: dict[str, Any]) -> NDArray[np.float32]:
    """Logits after the tokens of a vector, at the beginning of a sequence of its length."""
    tokens = expected["tokens"]
    row = Row(backend.new_sequence(64), np.resize(tokens, expected.get("positions", len(tokens))))
    return backend.forward([row], np.arange(len(tokens)))


@pytest.mark.parametrize("entry", MANIFEST["logits"], ids=lambda entry: entry["logits"].removesuffix(".logits.json"))
def test_logits_of_the_cpu(entry: dict[str, Any]) -> None:
    """Relative to the largest logit; spec/program.md grants 1e-4. tests/torch and tests/calibrate ask the others."""
    expected = json.loads((VECTORS / entry["logits"]).read_text())
    wanted = np.array(expected["logits"])
    with rkf.open(VECTORS / entry["file"]) as container:
        backend = CpuBackend(container, exact=True)
        logits = logits_of(backend, expected)
    assert logits.shape == wanted.shape
    # A norm of small sums of the delta rule makes more of rounding: 1.7e-5 in torch and numpy.
    tolerance = 1e-4 if "recurrent" in entry["file"] else 1e-5
    assert abs(logits - wanted).max() < tolerance * abs(wanted).max()


@pytest.mark.parametrize("entry", MANIFEST["logits"], ids=lambda entry: entry["logits"])
def test_logits_of_the_fast_path(entry: dict[str, Any]) -> None:
    """The bound that spec/program.md states for integer products."""
    stated = re.search(r"products are of integers.* is (1e-\d):", " ".join((SPEC / "program.md").read_text().split()))
    assert stated is not None
    expected = json.loads((VECTORS / entry["logits"]).read_text())
    wanted = np.array(expected["logits"])
    with rkf.open(VECTORS / entry["file"]) as container:
        backend = CpuBackend(container)
        logits = logits_of(backend, expected)
    assert abs(logits - wanted).max() < float(stated[1]) * abs(wanted).max()


@pytest.mark.parametrize("script", ("reference_reader.py", "reference_program.py", "reference_parts.py"))
def test_references_share_no_code(script: str) -> None:
    allowed = {"blake3", "math", "msgpack", "numpy", "pathlib", "struct", "zstandard"}
    allowed |= {"reference_reader", "sys"} if script != "reference_reader.py" else set()
    for node in ast.walk(ast.parse((SPEC / script).read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.module in allowed


def test_fused_multiply_add_would_show() -> None:
    """The vector `rounding.rkf` tells a fused multiply-add from two roundings."""
    with rkf.open(VECTORS / "rounding.rkf") as container:
        values = container.values("fused")
    assert values.affine is not None and values.affine.a is not None and values.affine.b is not None
    a, b, centroids = values.affine.a[0], values.affine.b[0], values.centroids[0].astype(np.float64)
    fused = (centroids * np.float64(a) + np.float64(b)).astype(np.float32)  # a product of two f32 is exact in f64
    assert (fused != np.float32(a) * values.centroids[0] + b).sum() > 4


def test_generator_reproduces_the_vectors(tmp_path: Path) -> None:
    """The committed bytes are what spec/make_vectors.py makes, but for zstd frames, whose bytes its version decides."""
    sys.path.insert(0, str(SPEC))
    import make_vectors

    assert make_vectors.make(tmp_path) == MANIFEST
    for entry in MANIFEST["logits"]:
        made, kept = (json.loads((folder / entry["logits"]).read_text()) for folder in (tmp_path, VECTORS))
        assert made.keys() == kept.keys() and made["tokens"] == kept["tokens"]
        assert np.allclose(made["logits"], kept["logits"], rtol=0, atol=1e-9)
    assert make_vectors.changed(tmp_path, VECTORS) == []
    (tmp_path / "smallest.rkf").write_bytes(b"other")
    (tmp_path / "dense.f32").unlink()
    assert make_vectors.changed(tmp_path, VECTORS) == ["dense.f32", "smallest.rkf"]
