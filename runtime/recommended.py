"""A model's recommended sampling options, and how given ones replace them."""

from __future__ import annotations

from collections.abc import Mapping
from secrets import randbits
from typing import Any

from rkf.errors import UsageError
from rkf.model.metadata import ModelMetadata
from rkf.runtime.sampling import Sampling

_NAMES = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}
_NEUTRAL = {"temperature": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
_SEED_BITS = 53  # what any JSON reader keeps exactly


def recommended(metadata: ModelMetadata) -> dict[str, Any]:
    """The options that the model's authors recommend and that have an effect; none for most small models."""
    found = {}
    for name, kind in _NAMES.items():
        if name in metadata.generation:
            try:
                value = kind(metadata.generation[name])
                Sampling(**{name: value})
            except (UsageError, ValueError, OverflowError):  # such as top_k 0, which turns it off
                continue
            if value != _NEUTRAL.get(name):
                found[name] = value
    return found


def sampling_for(metadata: ModelMetadata, given: Mapping[str, Any]) -> Sampling:
    """The given options, the recommended ones in place of those that are missing, and a random seed without one."""
    options = {**recommended(metadata), **given}
    if options.get("seed") is None:
        options["seed"] = randbits(_SEED_BITS)
    return Sampling(**options)
