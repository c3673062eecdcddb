"""What the writers of 1.0 files made of a ModelConfig; the package only reads such files."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import asdict
from typing import Any

from rkf.model.first_form import ModelConfig

_OPTIONAL = (".bias", "q_norm.weight", "k_norm.weight")


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    """The map `metadata.model`: no None, tuples as lists."""
    return _without_none(asdict(config))


def shapes_of(config: ModelConfig, *, optional: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a model with all optional ones, or with none."""
    return {weight.name: weight.shape for weight in config.program(_Names(optional)).weights()}


class _Names(Container[str]):
    """The names of a file with all optional tensors, or with none."""

    def __init__(self, optional: bool) -> None:
        self._optional = optional

    def __contains__(self, name: object) -> bool:
        return self._optional or not str(name).endswith(_OPTIONAL)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value
