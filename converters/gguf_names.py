"""Hugging Face's tensor names -> names in a GGUF, by the tables of the gguf package."""

from __future__ import annotations

import re
from collections.abc import Container

import gguf

from rkf.converters.families.layout import Layout, Origin
from rkf.errors import UnsupportedError

_ARCHITECTURES = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
_ENDINGS = (".weight", ".bias", ".scale")
_NUMBER = re.compile(r"(\w+\.layers\.)(\d+)\.(.+)")


def gguf_layout(architecture: str, layout: Layout, numbers: Container[str] = ()) -> Layout:
    """The layout with GGUF's names. layout: over full names. numbers: names in a layer that stand for fields; they stay
    as they are.
    """
    # Only the names of one layer are translated, then the number is restored: a table of all layers takes seconds.
    table = gguf.get_tensor_name_map(_ARCHITECTURES[architecture], 1)

    def rename(name: str) -> str:
        match = _NUMBER.fullmatch(name)
        if match is not None and match[3] in numbers:
            return name
        single = name if match is None else f"{match[1]}0.{match[3]}"
        found = table.get_name(single, try_suffixes=_ENDINGS)
        if found is None:
            raise UnsupportedError(f"tensor {name} has no name in a GGUF of architecture {architecture}")
        return found if match is None else f"blk.{match[2]}.{found.removeprefix('blk.0.')}"

    def renamed(name: str) -> tuple[Origin, ...]:
        return tuple(origin.renamed(rename) for origin in layout(name))

    return renamed
