"""Where the experts' matrices are in a checkpoint: one tensor for each expert, or stacks. Knows no family."""

from __future__ import annotations

from collections.abc import Mapping

from rkf.converters.families.layout import Layout, Origin, as_named

_OWN = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}


def expert_stacks(
    count: int, inner: int, folder: str = "mlp.experts", names: Mapping[str, str] = _OWN, rest: Layout = as_named
) -> Layout:
    """Experts are separate tensors. transformers 5 may also store them stacked, with gate and up in one, gate first.

    folder, names: the checkpoint's names of the experts and of their matrices. rest: the layout of other tensors.
    """

    def layout(name: str) -> tuple[Origin, ...]:
        part = _matrix(name)
        if part is None:
            return rest(name)
        single = tuple(f"{folder}.{number}.{names[part]}.weight" for number in range(count))
        return Origin(single, stacked=True), fused_stack(
            part, count, inner, f"{folder}.gate_up_proj", f"{folder}.down_proj"
        )

    return layout


def fused_stacks(count: int, inner: int, gate_up: str, down: str, rest: Layout = as_named) -> Layout:
    """Experts are stacks, with gate and up in one, gate first. gate_up, down: their names in the checkpoint."""

    def layout(name: str) -> tuple[Origin, ...]:
        part = _matrix(name)
        return rest(name) if part is None else (fused_stack(part, count, inner, gate_up, down),)

    return layout


def fused_stack(part: str, count: int, inner: int, gate_up: str, down: str) -> Origin:
    """The origin of one of gate_proj, up_proj and down_proj in such stacks."""
    if part == "down_proj":
        return Origin((down,))
    start = 0 if part == "gate_proj" else inner
    return Origin((gate_up,), (slice(0, count), slice(start, start + inner)))


def renamed(names: Mapping[str, str]) -> Layout:
    """The layout of a checkpoint with other names. names: beginnings in the program -> in the checkpoint."""

    def rename(name: str) -> str:
        begin = next((begin for begin in names if name.startswith(begin)), "")
        return names.get(begin, "") + name.removeprefix(begin)

    return lambda name: as_named(rename(name))


def _matrix(name: str) -> str | None:
    """gate_proj, up_proj or down_proj of a stack's name; None for any other tensor."""
    return name.split(".")[2] if name.startswith("mlp.experts.") and name.endswith(".weight") else None
