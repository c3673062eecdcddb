"""spec/interchange.md says what the converters do: names in GGUF, the order of rope's rows, the preimage of an id."""

from __future__ import annotations

import inspect
import json
import re

import numpy as np
import pytest
from blake3 import blake3

import rkf
from rkf.converters import families
from rkf.converters.families.layout import Origin
from rkf.converters.families.layout_transforms import Unpermuted
from rkf.converters.gguf_names import gguf_layout
from rkf.format.part_directory import part_name
from tests.spec.document import SPEC, VECTORS, code, hexdump, table

TEXT = (SPEC / "interchange.md").read_text()


def canonical_names() -> set[str]:
    """The names of spec/metadata.md, section 2."""
    rows = table("metadata.md", "name", "shape", "required")
    found = {name for row in rows for name in code(row[0]) if name.endswith("weight")}
    return {re.sub(r"^L\.", "model.layers.N.", name) for name in found}


@pytest.mark.parametrize("architecture", ("llama", "qwen2", "qwen3"))
def test_names_in_gguf(architecture: str) -> None:
    listed = {code(canonical)[0]: code(name)[0] for canonical, name in table("interchange.md", "canonical", "GGUF")}
    assert listed.keys() == canonical_names()
    layout = gguf_layout(architecture, lambda name: (Origin((name,)),))
    for canonical, name in listed.items():
        if "_norm." in canonical and architecture != "qwen3":
            continue
        for ending in ("weight", "bias") if "_proj" in canonical else ("weight",):
            full, wanted = (each.replace("N", "7").replace("weight", ending) for each in (canonical, name))
            assert layout(full)[0].names == (wanted,)


def test_the_order_of_rows() -> None:
    heads, size = 3, 6
    stored = np.arange(heads * size * 2).reshape(heads * size, 2)
    names = {"heads": heads, "d": size, "stored": stored}
    for line in re.findall(r"^    (?:canonical|stored) = .*$", TEXT, re.MULTILINE):
        exec(line.strip(), {}, names)
    assert (names["stored"] == stored).all()
    assert (names["canonical"] == Unpermuted(heads).apply(stored)).all()
    found = re.search(r"the canonical rows 0 … 5 are the rows ([\d, ]+) of the file", TEXT)
    assert found is not None
    assert json.loads(f"[{found[1]}]") == Unpermuted(1).apply(np.arange(6)).tolist()


def test_the_architectures_with_this_order() -> None:
    said = re.search(r"Architectures with this order: ([^.]+)\.", TEXT)
    assert said is not None
    modules = [module for module in vars(families).values() if hasattr(module, "FAMILY")]
    assert len(modules) == len(families.FAMILIES)
    permuted = [
        module for module in modules if "unpermuted(" in inspect.getsource(module) or hasattr(module, "unpermuted")
    ]
    assert set(code(said[1])) == {module.FAMILY.gguf.architecture for module in permuted}


def test_the_preimage() -> None:
    preimage = hexdump("interchange.md")
    with rkf.open(VECTORS / "smallest.rkf") as container:
        assert blake3(preimage).digest() == container.ranks_id
        assert container.ranks_id.hex() in TEXT
        assert blake3(b"\x90").digest() == container.dense_id
    assert f"these {len(preimage)} bytes" in TEXT


def test_names_of_files() -> None:
    rows = table("interchange.md", "file", "ending", "media type")
    assert part_name("m.rkf", 1, 3) == "m" + code(rows[1][1])[0]
