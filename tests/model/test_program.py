"""Programs: maps to ops and back, the tensors and widths that follow, and what the largest one costs to check."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rkf
from rkf.errors import StructureError, UnsupportedError
from rkf.format.constants import FEATURE_PROGRAM, VERBATIM
from rkf.model.expected import read_model
from rkf.model.frequencies import Frequencies
from rkf.model.metadata import ModelMetadata, SpecialToken
from rkf.model.op import MATRIX, ROUTER, STACK, Chosen, Op
from rkf.model.op_maps import MAX_LAYERS, MAX_OPS, MAX_SIZE
from rkf.model.ops import Add, Attention, Embed, Linear, Logits, Route, Scale
from rkf.model.program import Program
from tests.spec.document import VECTORS

FILES = sorted(VECTORS.glob("program-*.rkf"))
STEM = (Embed(dst="x", table="embed", rows=8, cols=4),)
TOP = (Logits(dst="y", src="x", weight="embed", rows=8),)


def model(path: Path) -> ModelMetadata:
    with rkf.open(path) as container:
        assert container.model is not None
        return container.model


def program(*kinds: tuple[Op, ...], order: tuple[int, ...] | None = None) -> Program:
    return Program(STEM, kinds, order or tuple(range(len(kinds))), TOP)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_vectors_come_back(path: Path) -> None:
    """What a file says is what is written again, key by key."""
    with rkf.open(path) as container:
        assert container.superblock.required == FEATURE_PROGRAM
        assert container.model is not None
        assert container.model.to_metadata() == container.metadata["model"]
        assert ModelMetadata.from_metadata(container.model.to_metadata()) == container.model
        assert [name for name in VERBATIM if container.blob(name) is None] == []
        assert list(container.tensors) == sorted(weight.name for weight in container.model.program.weights())


def test_metadata_of_a_vector() -> None:
    found = model(VECTORS / "program-windows.rkf")
    assert (found.layers, found.vocab_size, found.context_length, found.family) == (4, 24, 64, "golden")
    assert found.special_tokens == {"bos_token": SpecialToken("t1", 1), "mask_token": SpecialToken("<mask>")}
    cache = found.program.cache_of(0)
    assert cache is not None and cache.window == 4 and found.program.cache_of(3) is None


def test_a_forgotten_feature_bit_is_named() -> None:
    with rkf.open(VECTORS / "program-plain.rkf") as container:
        superblock = replace(container.superblock, required=0)
        with pytest.raises(StructureError, match=r"bit 2, as metadata\.model has a program"):
            read_model(container.directory, superblock)


def test_free_keys_mean_nothing() -> None:
    """x- keys may stand in every map of a program, with any value."""
    found = model(VECTORS / "program-windows.rkf")
    metadata = json.loads(json.dumps(found.to_metadata()))
    free = {"x-note": [{"a": "b"}]}
    for place in (
        metadata,
        metadata["generation"],
        metadata["special_tokens"],
        metadata["special_tokens"]["bos_token"],
    ):
        place |= free
    written = metadata["program"]
    for place in (written, written["ropes"][1], written["stem"][0], written["kinds"][0][6], written["top"][1]):
        place |= free
    assert ModelMetadata.from_metadata(metadata) == found


def test_roles_and_shapes_of_stacks() -> None:
    found = {weight.name: weight for weight in model(VECTORS / "program-experts.rkf").program.weights()}
    assert found["model.layers.0.experts.down"][1:] == ((6, 12, 10), STACK)
    assert found["model.layers.0.router.weight"][1:] == ((6, 12), ROUTER)
    assert found["head.weight"].role == MATRIX


def test_shared_tensors_come_once() -> None:
    assert [weight.name for weight in program((Scale(dst="x", src="x", factor=2.0),)).weights()] == ["embed"]


def test_widths_are_the_widest() -> None:
    wide = (Linear(dst="h", src="x", weight="w", rows=9), Linear(dst="x", src="h", weight="v", rows=4))
    narrow = (Linear(dst="h", src="x", weight="w", rows=3), Linear(dst="x", src="h", weight="v", rows=4))
    assert program(wide, narrow).widths() == {"x": 4, "h": 9, "y": 8}
    routed = Route(dst="r", src="x", weight="w", experts=4, count=2, score="softmax")
    assert routed.width({"x": 4}) == Chosen(4, 2)


def test_long_ropes() -> None:
    rope = Frequencies((1.0,), long=(0.5,), original_context=16)
    assert [rope.of(positions) for positions in (1, 16, 17)] == [(1.0,), (1.0,), (0.5,)]


@pytest.mark.parametrize("key", ("act", "score", "pairs"))
def test_unknown_words_come_before_damage(key: str) -> None:
    """Also where nothing else of the metadata makes sense."""
    name = {"act": "gate", "score": "route", "pairs": "rope"}[key]
    for metadata in (
        {"kinds": [[{"op": name, key: "newer"}]]},
        {"top": [{"op": name, key: "newer", "more": 1}], "kinds": 3},
    ):
        known = r"'newer' is not known to this version, which knows \w+, .*; update rkf$"
        with pytest.raises(UnsupportedError, match=known) as caught:
            ModelMetadata.from_metadata({"program": metadata})
        assert caught.value.exit_code == 4


def seconds(metadata: dict[str, Any]) -> float:
    start = time.process_time()
    found = Program.from_metadata(metadata)
    list(found.weights())
    return time.process_time() - start


def test_the_largest_programs_cost_little() -> None:
    """4096 layers of 4094 ops; as many kinds as there can be; as many ops that share a cache."""
    add = Add(a="x", b="x", dst="x")
    many = [program((add,) * (MAX_OPS - 2), order=(0,) * MAX_LAYERS)]
    lasting = tuple(Embed(dst=f"v{n}", table="embed", rows=8, cols=4) for n in range(MAX_OPS // 2 - 1))
    kinds = tuple((Add(a="x", b=f"v{n}", dst="x"),) for n in range(MAX_OPS // 2 - 1))
    many.append(replace(program(*kinds), stem=STEM + lasting))
    sizes = {"heads": 1, "kv_heads": 1, "head_dim": 4, "value_dim": 4, "scale": 1.0}
    own = (Attention(dst="x", q="x", k="x", v="x", **sizes),)
    shares = (Attention(dst="x", q="x", shares=0, **sizes),) * (MAX_OPS - 3)
    many.append(program(own, shares, order=(0, *[1] * (MAX_LAYERS - 1))))
    for each in many:
        each.check()
        assert seconds(each.to_metadata()) < 1


def test_widths_have_a_limit() -> None:
    big = Linear(dst="q", src="x", weight="w", rows=MAX_SIZE)
    sizes = {"heads": MAX_SIZE, "kv_heads": 1, "head_dim": 1, "value_dim": MAX_SIZE, "scale": 1.0}
    ops = (big, Linear(dst="k", src="x", weight="k", rows=1), Attention(dst="a", q="q", k="k", v="q", **sizes))
    with pytest.raises(StructureError, match="at most 2147483647 numbers"):
        program((*ops, Linear(dst="x", src="a", weight="o", rows=4))).check()
