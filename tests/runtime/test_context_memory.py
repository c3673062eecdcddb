"""Memory of a context: what is told beforehand is what a sequence then holds, and windows hold their window alone."""

import pytest

from rkf.model.ops import Add, Attention, Embed, Linear, Logits
from rkf.model.program import Program
from rkf.runtime.kv_cache import CacheLayout
from rkf.runtime.paged_sequence import PagedSequence

PAGE = 256


def layer(window):
    size = {"heads": 2, "kv_heads": 1, "head_dim": 8, "value_dim": 8, "scale": 1.0}
    return (
        Linear(src="x", dst="q", weight="q", rows=16),
        Linear(src="x", dst="k", weight="k", rows=8),
        Linear(src="x", dst="v", weight="v", rows=8),
        Attention(q="q", k="k", v="v", dst="a", window=window, **size),
        Add(a="x", b="a", dst="x"),
    )


def program(*windows):
    kinds = list(dict.fromkeys(windows))
    found = Program(
        stem=(Embed(dst="x", table="table", rows=5, cols=16),),
        kinds=tuple(map(layer, kinds)),
        order=tuple(kinds.index(window) for window in windows),
        top=(Logits(src="x", dst="logits", weight="head", rows=5),),
    )
    found.check()
    return found


def held(sequence):
    """Bytes of all pages of a sequence."""
    return sum(page.array.nbytes for table in sequence._tables for page in table._pages if page is not None)


@pytest.mark.parametrize("tokens", [1, 256, 257, 600, 1500])
@pytest.mark.parametrize("windows", [(None, None), (300, None), (1, 300, 300)])
def test_what_is_told_is_what_is_held(tokens, windows):
    layout = CacheLayout(program(*windows), "int16")
    sequence, marked = PagedSequence(layout, 2000, ()), PagedSequence(layout, 2000, ())
    for fed in (min(tokens - 1, 700), max(tokens - 701, 0), 1):
        for each in (sequence, marked):
            each.reserve(fed)
            each.advance(fed)
        if fed > 1:
            marked.mark()
    assert held(sequence) == layout.bytes_of(tokens)
    assert held(marked) <= layout.bytes_of(tokens) + layout.bytes_to_go_back(tokens)


def test_a_window_holds_its_window():
    every, windowed = (CacheLayout(program(window), "int16") for window in (None, 512))
    assert every.bytes_of(32768) == 128 * every.groups[0].page_bytes
    assert windowed.bytes_of(32768) == (512 // PAGE) * windowed.groups[0].page_bytes
