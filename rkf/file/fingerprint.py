"""One hash over everything that decides a result: weights and options. A run may resume one with equal fingerprint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from blake3 import blake3

from rkf.file.container import Container
from rkf.format.canonical import encode


def fingerprint(containers: Iterable[Container], options: list[Any]) -> str:
    """The hash of weights, independent of their packing and file names, and of the options."""
    weights = [[each.ranks_id, each.dense_id, each.values_id] for each in containers]
    return blake3(encode([weights, options])).hexdigest()
