"""spec/program.md says what rkf/model says of ops, keys, defaults, words and limits; its example is a program."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

import rkf
from rkf.errors import StructureError
from rkf.format.constants import VERBATIM
from rkf.model import metadata, op_maps
from rkf.model.op import Op, keys, kind_of
from rkf.model.ops import OPS
from rkf.model.program import Program
from tests.spec import reference
from tests.spec.document import SPEC, VECTORS, code, op_keys, table

DOCUMENT = "program.md"
LOGITS = json.loads((VECTORS / "manifest.json").read_text())["logits"]
# A program made from 1.0 metadata has its frequencies in f32; the logits of these files are of f64 ones. With f64 ones
# the difference is below 1e-13.
_F32_FREQUENCIES = {"model.rkf": 1e-6, "model-band.rkf": 1e-5}


def test_keys_of_ops() -> None:
    listed = op_keys()
    assert list(listed) == list(OPS)
    for name, op in OPS.items():
        expected = {
            key.name: {"kind": kind_of(key), "default": key.default, "above": key.metadata.get("above")}
            for key in keys(op)
        }
        assert listed[name] == expected, name


def test_words() -> None:
    listed = {
        code(row[0])[0]: tuple(code(row[1])) for row in table(DOCUMENT, "key", "one of") if len(code(row[0])) == 1
    }
    choices = {key.name: key.metadata["choices"] for op in OPS.values() for key in keys(op) if kind_of(key) == "choice"}
    assert {key: words for key, words in listed.items() if key in choices} == choices
    acts = [code(row[0])[0] for row in table(DOCUMENT, "act", "of x")]
    assert tuple(acts) == choices["act"]
    text = (SPEC / DOCUMENT).read_text()
    formulas = re.findall(r"^    (\w+) ", text.partition("## 6.")[2].partition("## 7.")[0], re.MULTILINE)
    assert [word for word in formulas if word in OPS] == list(OPS)


def test_every_op_has_a_rule() -> None:
    """The table of widths and shapes names the tensors that ops name."""
    rows = {code(row[0])[0]: row for row in table(DOCUMENT, "op", "width of `dst`", "tensors", "rules")}
    assert list(rows) == list(OPS)
    for name, op in OPS.items():
        named = [key.name for key in keys(op) if kind_of(key) == "tensor"]
        assert bool(named) == bool(rows[name][2])
        assert all(re.search(rf"\b{tensor}\b", rows[name][2]) for tensor in named), name


def test_limits() -> None:
    assert {row[0].replace("`", ""): int(row[1]) for row in table(DOCUMENT, "limit", "value")} == {
        "ops of stem, all kinds and top together": op_maps.MAX_OPS,
        "layers": op_maps.MAX_LAYERS,
        "ropes": op_maps.MAX_ROPES,
        "frequencies of a rope": op_maps.MAX_FREQUENCIES,
        "end tokens": metadata.MAX_EOS,
        "special tokens": metadata.MAX_SPECIAL,
        "greatest size and width": op_maps.MAX_SIZE,
    }
    text = " ".join((SPEC / DOCUMENT).read_text().split())
    assert f"at most {op_maps.MAX_NUMBER!r}".replace("e+", "e") in text and op_maps.MIN_POSITIVE == 2.0**-126


@pytest.mark.parametrize(
    ("holding", "example"),
    (
        ("add_bos", {"bos_id": 1, "family": "f"}),
        ("stem", {}),
        ("frequencies", {"long": [1.0], "original_context": 5, "factor": 2.0}),
    ),
)
def test_keys_of_maps(holding: str, example: dict[str, Any]) -> None:
    """The keys that a file has are those that are listed, those that may be absent with a `?`."""
    listed = [code(row[0])[0] for row in table(DOCUMENT, "key", "type", "rule", holding=holding)]
    program = json.loads(json.dumps(PLAIN))
    least = {"add_bos": model_map(), "stem": program, "frequencies": {"frequencies": [0.5]}}[holding]
    assert {key for key in listed if not key.endswith("?")} == set(least)
    assert {key.rstrip("?") for key in listed} == set(least) | set(example)
    read(holding, least | example)
    for key in [key for key in listed if not key.endswith("?")]:
        with pytest.raises(StructureError, match=f"'{key}'"):
            read(holding, {other: value for other, value in least.items() if other != key})


def read(holding: str, value: dict[str, Any]) -> object:
    if holding == "add_bos":
        return metadata.ModelMetadata.from_metadata(value)
    return Program.from_metadata(value) if holding == "stem" else op_maps.rope_from_map(value, "rope")


PLAIN = {
    "stem": [{"op": "embed", "dst": "x", "table": "e", "rows": 4, "cols": 3}],
    "kinds": [[{"op": "scale", "dst": "x", "src": "x", "factor": 2.0}]],
    "order": [0],
    "ropes": [],
    "top": [{"op": "logits", "dst": "y", "src": "x", "weight": "w", "rows": 4}],
}


def model_map() -> dict[str, Any]:
    return {
        "add_bos": False,
        "context_length": 8,
        "eos_ids": [],
        "generation": {},
        "program": PLAIN,
        "special_tokens": {},
    }


def test_blobs() -> None:
    text = (SPEC / DOCUMENT).read_text()
    names = re.search(r"Blobs of these names MAY stand in files with bit 2: ([^.]*(?:\.json[^.]*)*)\.\s", text)
    assert names is not None and tuple(code(names[1])) == VERBATIM


def test_length() -> None:
    lines = (SPEC / DOCUMENT).read_text().splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) < 200
    assert len((SPEC / "reference_program.py").read_text().splitlines()) <= 270


def example(start: str, stop: str) -> list[Op]:
    """The ops of section 12 between two words."""
    text = (SPEC / DOCUMENT).read_text().partition("## 12.")[2].partition(start)[2].partition(stop)[0]
    items = []
    for body in re.findall(r"\{(op: [^}]*)\}", text):
        pairs = dict(pair.split(": ") for pair in body.split(", "))
        items.append({key: json.loads(text) if text[0].isdigit() else text for key, text in pairs.items()})
    return list(op_maps.OpReader(1).ops(items, "example"))


def test_the_example_is_the_vector() -> None:
    """Section 12: the program of vectors/model.rkf."""
    with rkf.open(VECTORS / "model.rkf") as container:
        assert container.model is not None
        program = container.model.program
    assert example("    stem ", "    kind ") == list(program.stem)
    assert example("    top ", "## 13") == list(program.top)
    assert [example("    kind ", "    order")] == list(map(list, program.kinds))
    assert program.order == (0, 0) and len(program.ropes) == 1 and len(program.ropes[0].frequencies) == 2


@pytest.mark.parametrize("entry", LOGITS, ids=lambda entry: entry["logits"])
def test_reference_program(entry: dict[str, Any]) -> None:
    """The reference program gives the logits of every model, of both forms."""
    expected = json.loads((VECTORS / entry["logits"]).read_text())
    with rkf.open(VECTORS / entry["file"]) as container:
        assert container.model is not None
        program = container.model.program.to_metadata()
    tensors = reference.read(VECTORS / entry["file"])
    found = reference.run_program(program, tensors, expected["tokens"], expected.get("positions"))
    wanted = np.array(expected["logits"])
    tolerance = _F32_FREQUENCIES.get(entry["file"], 1e-9)
    assert found.shape == wanted.shape and abs(found - wanted).max() < tolerance * abs(wanted).max()
    if "positions" in expected:  # a program in the file, not one made from 1.0 metadata
        again = reference.run(VECTORS / entry["file"], expected["tokens"], expected["positions"])
        assert np.array_equal(found, again)


def test_vectors_have_every_op_and_key() -> None:
    seen: set[tuple[str, str]] = set()
    words: set[tuple[str, str]] = set()
    for path in VECTORS.glob("program-*.rkf"):
        with rkf.open(path) as container:
            program = container.metadata["model"]["program"]
        for item in (item for ops in (program["stem"], *program["kinds"], program["top"]) for item in ops):
            seen |= {(item["op"], key) for key in item}
            words |= {(key, value) for key, value in item.items() if isinstance(value, str)}
    every = {(name, key) for name, op in OPS.items() for key in keys(op)}
    missing = {(name, key.name) for name, key in every} - seen
    assert missing <= {("gate", "limit"), ("gate", "alpha"), ("gate", "shift")}  # experts have them
    choices = {(key.name, word) for _, key in every for word in key.metadata.get("choices", ())}
    assert choices - words <= {("pairs", "halves")}  # the default
