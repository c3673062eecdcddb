"""Random damage with recomputed hashes, for hypothesis and `tests/fuzz`. Knows only the shape of a directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from tests.hostile.forge import REMOVED, Forge

# Values that have broken readers before: around every limit of the format, of integers, and of other types.
ODD: tuple[Any, ...] = (
    *(REMOVED, True, False, 0.0, 1.0, 0.5, 1e308, b"", bytes(32), bytes(31)),
    *(0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 35, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1 << 16, -1, -(1 << 63)),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 48, (1 << 63) - 1, 1 << 63, (1 << 64) - 64, (1 << 64) - 1),
    *("", "raw", "zstd", "plane", "counts", "dense", "values", "alias", "clustered", "f16", "f32", "bf16", "tensor"),
    *("row", "group", "head", "body", "norm", "none", "ascending", "x-", "\x00", "é" * 130),
    *([], [0], [1, 1], [1] * 5, [0, 1, 2, 3], {}, {"x-note": 1}, {"a": "f16", "granularity": "row"}),
)
Draw = Callable[[int], int]  # an integer from 0 to n - 1


def places(node: Any, path: tuple[str, ...] = ("directory",)) -> Iterator[tuple[str, ...]]:
    """Every place in a directory, as a path of tests/hostile/forge.py."""
    yield path
    if isinstance(node, dict):
        for key, value in node.items():
            yield from places(value, (*path, key))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from places(value, (*path, str(number)))


def damaged(data: bytes, draw: Draw) -> bytes:
    """One to three changes of the directory, sections, padding or superblock, with hashes recomputed."""
    forge = Forge(data)
    kinds = sorted(draw(len(CHANGES)) for _ in range(1 + draw(3)))
    for kind in kinds:
        CHANGES[kind](forge, draw)
    return forge.build(reseal=True)


def damaged_program(data: bytes, draw: Draw) -> bytes:
    """One to three changes of what a file says of its model, sealed again."""
    forge = Forge(data)
    for _ in range(1 + draw(3)):
        change_place(forge, draw, ("directory", "metadata", "model"))
    return forge.build(reseal=True)


def change_place(forge: Forge, draw: Draw, under: tuple[str, ...] = ("directory",)) -> None:
    """Replace a value with an odd one, or with the value of another place."""
    if not isinstance(forge.directory, dict):
        return
    every = [path for path in places(forge.directory) if len(path) > 1 and path[: len(under)] == under]
    if every:
        value = ODD[draw(len(ODD))] if draw(4) else value_at(forge.directory, every[draw(len(every))])
        forge.edit("/".join(every[draw(len(every))]), deepcopy(value))


def value_at(node: Any, path: tuple[str, ...]) -> Any:
    for key in path[1:]:
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node


def change_content(forge: Forge, draw: Draw) -> None:
    """Overwrite, cut or lengthen a section."""
    number = draw(len(forge.extents))

    def change(old: bytes) -> bytes:
        at, length = draw(len(old) + 1), draw(9)
        new = bytes(draw(256) for _ in range(draw(9)))
        return old[:at] + new + old[at + (len(new) if draw(3) else length) :]

    forge.edit(f"section/{number}", change)


def change_packed(forge: Forge, draw: Draw) -> None:
    """Change bytes of the encoded directory."""

    def change(old: bytes) -> bytes:
        at = draw(len(old) + 1)
        return old[:at] + bytes(draw(256) for _ in range(draw(4))) + old[at + draw(4) :]

    forge.edit("packed", change)


def change_superblock(forge: Forge, draw: Draw) -> None:
    """Change one field, or a byte of padding or of the sections, of which an index of parts has none."""
    fields = ("major", "minor", "kind", "required", "optional", "directory_offset", "directory_length", "file_length")
    if draw(2) or len(forge.body) == 128:
        forge.edit(f"superblock/{fields[draw(len(fields))]}", draw(70))
    else:
        forge.edit(f"padding/{128 + draw(len(forge.body) - 128)}", draw(256))


# In an order in which they combine: sections first, while the directory still describes them.
CHANGES = (change_content, change_superblock, change_place, change_place, change_packed)
