"""Finds the recipe of least loss within a budget, by dry runs of the conversion. Knows no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from rkf.cluster import allocation
from rkf.cluster.recipe import Recipe
from rkf.converters.ledger import Ledger
from rkf.converters.source import Source, stored_head
from rkf.errors import UsageError
from rkf.format.constants import index_bits, plane_bits, row_bytes
from rkf.model.roles import clusterable

_CODING = 1.018  # zstd's size of the ranks relative to their entropy: 1.017 at 4.6 bits, 1.019 at 3.4


def fitting(
    source: Source,
    rehearse: Callable[[Recipe], Ledger],
    size: int | None,
    bpw: float | None,
    losses: Mapping[str, float] | None,
    cpu: str | None = None,
) -> Recipe:
    """A recipe whose file takes at most `size` bytes, or whose clustered tensors at most `bpw` bits a weight.

    losses: the measured loss of each matrix when stored coarsely; None: the loss expected from its role. cpu: use only
    K that this level of CPU multiplies fastest (`allocation.FASTEST`). Raises UsageError if even the smallest K for all
    does not fit.
    """
    program = source.model.program
    shapes, weights = _matrices(source)
    embeddings = allocation.lone_embeddings(program, stored_head(source))
    allowed = allocation.ladders(shapes, embeddings, cpu)
    limit = size if size is not None else int((bpw or 0) * weights / 8)

    def taken(chosen: list[str]) -> int:
        ledger = rehearse(allocation.recipe(program, allowed, chosen))
        return ledger.file_bytes if size is not None else ledger.clustered_bytes

    least = taken([])
    if limit < least:
        expected = f"{least} bytes" if size is not None else f"{8 * least / weights:.4f} bits per weight"
        raise UsageError(f"{source.label}: a budget of {size or bpw} is too small: expected at least {expected}")
    losses = losses or _expected(source, shapes)
    chosen = allocation.within(allocation.steps(shapes, losses, allowed), limit - least)
    while taken(chosen) > limit:  # exceeded by the padding of sections, or by a longer list of names
        chosen.pop()
    return allocation.recipe(program, allowed, chosen)


def archive(
    source: Source,
    rehearse: Callable[[Recipe], Ledger],
    size: int | None,
    bpw: float | None,
    losses: Mapping[str, float] | None,
) -> Recipe:
    """The same for a file that `rkf pack` packs: the limits are on the packed size, which is known to 1 %."""
    shapes, weights = _matrices(source)
    losses = losses or _expected(source, shapes)
    program = source.model.program
    trial = allocation.archive(program, shapes, losses, allocation.LEAST_BITS)
    ledger = rehearse(trial)
    planes = sum(
        row_bytes(shape[-1], width) * prod(shape[:-1])
        for name, shape in shapes.items()
        for width in plane_bits(index_bits(trial.rule(name, shape).k or 2))
    )
    limit = size if size is not None else (bpw or 0) * weights / 8
    beside = (ledger.file_bytes if size is not None else ledger.clustered_bytes) - planes
    bits = 8 * (limit - beside) / weights / _CODING
    if bits < allocation.LEAST_BITS:
        raise UsageError(
            f"{source.label}: a budget of {size or bpw} is too small for {allocation.LEAST_BITS} bits a weight"
        )
    return allocation.archive(program, shapes, losses, min(bits, allocation.MOST_BITS))


def _expected(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Losses expected from the matrices' roles."""
    return allocation.expected_losses(source.model.program, shapes, stored_head(source))


def _matrices(source: Source) -> tuple[dict[str, tuple[int, ...]], int]:
    """The shapes of the tensors that a recipe may cluster, and their number of weights."""
    chosen = set(clusterable(source.model.program))
    shapes = {name: spec.shape for name, spec in source.tensors.items() if name in chosen}
    return shapes, sum(map(prod, shapes.values()))
