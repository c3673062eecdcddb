"""Keys and values, in pages of 256 positions that sequences may share: their layout, and the pages of one sequence.

Slots (an Attention that keeps its own keys and values) with the same reach share pages, so that pages behind a window
or chunk can be freed. A page holds [kv_heads] of one head's keys and values for each of its slots;
kernels/cache_format.py defines the order inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rkf.errors import ContextLengthError
from rkf.model.ops import Attention, Conv, Scan
from rkf.model.program import Program
from rkf.model.recurrent_ops import Recurrent
from rkf.runtime.buffers import LINE, padded
from rkf.runtime.held_bytes import HeldBytes
from rkf.runtime.snapshots import MOST
from rkf.runtime.structs import LANES, PAGE, WIDE

FORMATS = {"f32": (4, 4), "int16": (2, 2), "int16-int8": (2, 1), "int8": (1, 1)}  # bytes per number of keys, of values


def padded_value_dim(op: Attention) -> int:
    """Columns of one position's values, padded."""
    return -(-op.value_dim // WIDE) * WIDE


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a layer's keys and values: `offset` bytes into the pages of a group, `head_bytes` per key head."""

    group: int
    offset: int
    head_bytes: int


@dataclass(frozen=True, slots=True)
class Group:
    """Slots with the same window. window: the number of positions they see at most, None: all."""

    window: int | None
    page_bytes: int

    def pages(self, tokens: int) -> int:
        """Pages of a sequence of so many tokens, the last of which was fed alone."""
        return -(-tokens // PAGE) - self.seen(tokens - 1).start

    def seen(self, position: int) -> range:
        """The pages that hold the earlier positions that a position sees."""
        first = 0 if self.window is None else max(position - self.window + 1, 0)
        return range(first // PAGE, -(-position // PAGE) if first < position else first // PAGE)


class CacheLayout:
    """The slots of a program's layers, and their groups of pages, for a number format.

    states: where the states of a sequence lie, by layer and op, in its `state_bytes` of f32. held: the memory of all
    sequences.
    """

    def __init__(self, program: Program, number_format: str) -> None:
        self.held = HeldBytes()
        self.slots: dict[int, Slot] = {}
        windows: dict[int | None, int] = {}
        sizes: list[int] = []
        for layer in range(program.layers):
            op = program.cache_of(layer)
            if op is None:
                continue
            group = windows.setdefault(_seen(program, layer, op), len(sizes))
            if group == len(sizes):
                sizes.append(0)
            size = _head_bytes(op, number_format)
            self.slots[layer] = Slot(group, sizes[group], size)
            sizes[group] += op.kv_heads * size
        self.groups = tuple(Group(window, size) for window, size in zip(windows, sizes, strict=True))
        self.states: dict[tuple[int, str], int] = {}
        self.state_bytes = 0
        for layer in range(program.layers):
            for keeper in program.layer(layer):
                if isinstance(keeper, Recurrent):
                    self.states[layer, keeper.name] = self.state_bytes
                    self.state_bytes += _state_bytes(program, keeper)

    def bytes_of(self, tokens: int) -> int:
        """Memory of a sequence of so many tokens while it decodes. Slots with a window keep their window, states their
        size.
        """
        return self.state_bytes + sum(group.pages(tokens) * group.page_bytes for group in self.groups)

    def most_bytes(self, tokens: int) -> int:
        """Memory of a sequence of so many tokens that holds all pages and all copies of its states."""
        pages = -(-tokens // PAGE) * sum(group.page_bytes for group in self.groups)
        return pages + (MOST + 1) * self.state_bytes

    def bytes_to_go_back(self, tokens: int) -> int:
        """At most so much more memory lets a sequence of so many tokens go back to earlier lengths: copies of its
        states, and what windows saw from its last mark.
        """
        marked = sum(
            min(-(-tokens // PAGE), -(-(group.window - 1) // PAGE) + 1) * group.page_bytes
            for group in self.groups
            if group.window is not None
        )
        return min(MOST, tokens) * self.state_bytes + marked


def _seen(program: Program, layer: int, op: Attention) -> int | None:
    """How far back a slot is read: the widest window of those that share it."""
    sharing = [
        other
        for number in range(layer + 1, program.layers)
        for other in program.layer(number)
        if isinstance(other, Attention) and other.shares == layer
    ]
    windows = [each.reach for each in (op, *sharing)]
    return None if None in windows else max(window for window in windows if window is not None)


def _state_bytes(program: Program, op: Recurrent) -> int:
    """The state of an op in one sequence (kernels/recurrent.py), its rows padded to whole lanes."""
    if isinstance(op, Conv):
        columns = program.widths()[op.dst]
        return (op.taps - 1) * padded(columns if isinstance(columns, int) else 0, LANES) * 4
    if isinstance(op, Scan):
        return op.heads * op.state_dim * padded(op.head_dim, LANES) * 4
    return op.value_heads * op.key_dim * padded(op.value_dim, LANES) * 4


def _head_bytes(op: Attention, number_format: str) -> int:
    """Bytes of one head's keys and values in a page; integers add two f32 scales per position."""
    key_size, value_size = FORMATS[number_format]
    numbers = padded(op.head_dim, 2) * key_size + padded_value_dim(op) * value_size
    return PAGE * (numbers + (0 if number_format == "f32" else 8))


class Page:
    """Memory of one page. holders: the ids of the tables that use it; a set, because dropping one must be atomic."""

    __slots__ = ("address", "array", "holders")

    def __init__(self, size: int) -> None:
        # Zeros: positions past a sequence's end are read, with weight 0. From a cache line on, so no load crosses one.
        raw = np.zeros(size + LINE, np.uint8)
        aligned = -raw.ctypes.data % LINE
        self.array = raw[aligned : aligned + size]
        self.address = self.array.ctypes.data
        self.holders: set[int] = set()


class PageTable:
    """The pages of one sequence in one group. addresses: read by kernels, 0 where there is no page."""

    def __init__(self, group: Group, capacity: int, held: HeldBytes) -> None:
        self._group, self._held = group, held
        self._pages: list[Page | None] = []
        self._first = 0  # of the pages before this one, only the marked ones are left
        self._marked = range(0)  # pages that a window sees from the last mark: kept, so that it can go back there
        self.addresses = np.zeros(max(-(-capacity // PAGE), 1), np.int64)

    def reserve(self, length: int, tokens: int) -> None:
        """Make sure that positions length … tokens - 1 have pages of this table alone."""
        for number in range(length // PAGE, -(-tokens // PAGE)):
            page = self._page(number)
            if page is None or len(page.holders) > 1:
                self._put(number, self._copy(page))

    def growth_bytes(self, length: int, tokens: int) -> int:
        """The memory of the pages that `reserve` would make."""
        pages = (self._page(number) for number in range(length // PAGE, -(-tokens // PAGE)))
        return sum(self._group.page_bytes for page in pages if page is None or len(page.holders) > 1)

    def give_back(self, length: int) -> None:
        """Free the pages that the position `length` and later ones do not see."""
        if self._group.window is not None:
            keep = self._group.seen(length).start
            for number in range(self._first, min(keep, len(self._pages))):
                if number not in self._marked:
                    self._drop(number)
            self._first = max(self._first, keep)

    def mark(self, length: int) -> None:
        """Keep what a window sees from this length, instead of what it saw from the last mark."""
        if self._group.window is not None:
            self._marked, self._first = self._group.seen(length), 0

    def can_go_back_to(self, length: int) -> bool:
        """Whether everything that the position `length` sees is still there."""
        seen = self._group.seen(length)
        return seen.stop <= len(self._pages) and None not in self._pages[seen.start : seen.stop]

    def truncate(self, length: int) -> None:
        """Keep only the pages of the first `length` positions."""
        pages = -(-length // PAGE)
        for number in range(pages, len(self._pages)):
            self._drop(number)
        del self._pages[pages:]
        self._first = 0
        self._marked = self._marked if self._marked.stop <= pages else range(0)

    def contents(self) -> dict[int, NDArray[np.uint8]]:
        """The pages that are there, by number: u8[page_bytes] each."""
        return {number: page.array for number, page in enumerate(self._pages) if page is not None}

    def fill(self, number: int, content: NDArray[np.uint8]) -> None:
        """Put a page of this content, u8[page_bytes], in an empty place."""
        page = self._copy(None)
        page.array[:] = content
        self._put(number, page)

    def share_with(self, other: PageTable) -> None:
        """Give the same pages to another, empty table."""
        for number, page in enumerate(self._pages):
            if page is not None:
                other._put(number, page)
        other._marked = self._marked

    def close(self) -> None:
        self.truncate(0)

    def _page(self, number: int) -> Page | None:
        return self._pages[number] if number < len(self._pages) else None

    def _copy(self, page: Page | None) -> Page:
        try:
            copy = Page(self._group.page_bytes)
        except MemoryError:
            raise ContextLengthError("no memory for more keys and values: shorten the context") from None
        self._held.count(copy.array)
        if page is not None:
            copy.array[:] = page.array
        return copy

    def _put(self, number: int, page: Page) -> None:
        while len(self._pages) <= number:
            self._pages.append(None)
        if self._pages[number] is not None:
            self._drop(number)
        page.holders.add(id(self))
        self._pages[number] = page
        self.addresses[number] = page.address

    def _drop(self, number: int) -> None:
        page = self._pages[number]
        if page is not None:
            page.holders.discard(id(self))
        self._pages[number] = None
        self.addresses[number] = 0
