"""Canonical msgpack: one encoding per value; every other is refused before memory is allocated for it."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkf.errors import StructureError, UsageError
from rkf.format import canonical
from rkf.format.constants import MAX_CONTAINERS, MAX_DEPTH, MAX_DIRECTORY_BYTES

FLOATS = st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: x != 0 or str(x) == "0.0")
SCALARS = st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | FLOATS | st.text() | st.binary()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner), max_leaves=8
)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(VALUES.filter(lambda value: depth(value) <= MAX_DEPTH))
def test_values_come_back(value: Any) -> None:
    data = canonical.encode(value)
    decoded = canonical.decode(data)
    assert decoded == value
    assert canonical.encode(decoded) == data


@given(st.binary(max_size=40))
def test_bytes_are_refused_or_their_own_encoding(data: bytes) -> None:
    try:
        value = canonical.decode(data)
    except StructureError:
        return
    assert canonical.encode(value) == data


def test_keys_are_in_order_of_their_bytes() -> None:
    keys = ["\uffff", "\U00010000", "b", "a", "", "é"]
    assert list(canonical.decode(canonical.encode(dict.fromkeys(keys, 1)))) == sorted(keys, key=str.encode)


def test_numpy_floats_and_tuples_are_taken() -> None:
    assert canonical.encode({"a": np.float64(0.5), "b": (1, 2)}) == canonical.encode({"a": 0.5, "b": [1, 2]})


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "1 to"),
        (b"\x81\xa1a", "at byte"),
        (b"\x01\x01", "re-encoding"),
        (b"\xcc\x01", "re-encoding"),
        (b"\xd9\x01a", "re-encoding"),
        (b"\xca\x00\x00\x00\x00", "re-encoding"),
        (b"\xcb\x80" + bytes(7), "canonical number"),
        (b"\xcb\x7f\xf8" + bytes(6), "canonical number"),
        (b"\xcb\x7f\xf0" + bytes(6), "canonical number"),
        (b"\xc0", "nil"),
        (b"\xc1", "unused"),
        (b"\xd4\x01\x01", "extension"),
        (b"\xa1\xff", "at byte"),
        (b"\x82\xa1b\x01\xa1a\x01", "in order"),
        (b"\x82\xa1a\x01\xa1a\x01", "twice"),
        (b"\x81\x01\x01", "strings as keys"),
        (b"\x81\x90\x01", "strings as keys"),
        (b"\xdd\xff\xff\xff\xff", "count of 4294967295"),
        (b"\xdf\xff\xff\xff\xff", "count of 8589934590"),
        (b"\x91" * 100_000, "deep"),
        (b"\x81\xa1a" * 100_000, "deep"),
        (b"\xc6\xff\xff\xff\xff", "at byte"),
    ],
)
def test_what_is_not_canonical_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(StructureError, match=problem):
        canonical.decode(data)


def test_a_directory_over_the_cap_is_refused() -> None:
    with pytest.raises(StructureError, match=str(MAX_DIRECTORY_BYTES)):
        canonical.decode(bytes(MAX_DIRECTORY_BYTES + 1))


def test_maps_and_lists_are_counted() -> None:
    count = MAX_CONTAINERS  # plus the list that contains them
    with pytest.raises(StructureError, match=f"at most {MAX_CONTAINERS} maps and lists"):
        canonical.decode(b"\xdd" + count.to_bytes(4, "big") + b"\x80" * count)


def test_counts_take_no_memory_before_they_are_checked() -> None:
    data = b"".join(b"\xdd" + (200_000 - 5 * i).to_bytes(4, "big") for i in range(MAX_DEPTH)) + bytes(200_000)
    tracemalloc.start()
    with pytest.raises(StructureError):
        canonical.decode(b"\xdd\x7f\xff\xff\xff" + data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(data)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": None}, "a"),
        ({"a": {"b": [1, float("nan")]}}, "a.b.1"),
        ({"a": -0.0}, "a"),
        ({"a": 1 << 64}, "a"),
        ({"a": "\ud800"}, "a"),
        ({"\ud800": 1}, "value"),
        ({"a": {1: 2}}, "a"),
        ({"a": np.float32(1)}, "a"),
        ({"a": object()}, "a"),
    ],
)
def test_values_without_a_canonical_form_are_refused_by_place(value: Any, place: str) -> None:
    with pytest.raises(UsageError, match=f"^{place}: "):
        canonical.encode(value)


def test_values_too_deep_are_refused() -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    assert canonical.decode(canonical.encode(value)) == value
    with pytest.raises(UsageError, match="deep"):
        canonical.encode([value])
    with pytest.raises(StructureError, match="deep"):
        canonical.decode(msgpack.packb([value]))
