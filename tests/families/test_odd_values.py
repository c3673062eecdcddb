"""Each key of each config.json with an odd value: a description, or one line that names what is wrong."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import transformers

from rkf.converters.description import describe
from rkf.converters.quantised import quantisation
from rkf.errors import RkfError

from .common_keys import COMMON
from .models import VARIANTS

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 7, 10**9, 10**30, -(10**400), 0.5, -0.0, 1e-45, 1e300, math.nan, math.inf),
    *("", "x", "false", "\u0663", "\ud800", [], [[]], [0, -1], ["x", None], [1e300] * 3, {}, {"x": [None]}),
    {"rope_type": "yarn", "factor": math.nan},
)
SAMPLE = 12


def config_of(variant: str) -> dict[str, Any]:
    name, keys = VARIANTS[variant]
    config = transformers.AutoConfig.for_model(name, **{**COMMON, **keys})
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found


def places(config: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The keys, and those inside of objects."""
    for key, value in config.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *inner) for inner in places(value))


def changed(config: Any, place: tuple[str, ...], value: Any) -> dict[str, Any]:
    key, *rest = place
    return {**config, key: changed(config[key], tuple(rest), value) if rest else value}


def outcome(config: dict[str, Any]) -> str | None:
    """The line of a refusal; None for a description, of which every name is made."""
    try:
        quantisation(config)
        found = describe(config, "x")
        found.own_names(["lm_head.weight", "layers.0.x"])
    except RkfError as error:
        return str(error)
    return None


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_odd_value_is_one_line_or_a_description(variant: str) -> None:
    config = config_of(variant)
    every = [(place, value) for place in places(config) for value in ODD]
    for place, value in random.Random(variant).sample(every, SAMPLE):
        line = outcome(changed(config, place, value))
        assert line is None or "\n" not in line, (place, value)


def test_odd_values_of_the_keys_that_few_checkpoints_have() -> None:
    config = config_of(next(iter(VARIANTS)))
    rare = ("quantization_config", "compression_config", "text_config", "rope_scaling", "layer_types", "sliding_window")
    for key in rare:
        for value in ODD:
            assert "\n" not in (outcome(config | {key: value}) or "")
    inner = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"a": {}}}
    for key in (*inner, "weight_block_size"):
        for value in ODD:
            quantised = {"quant_method": "fp8"} if key == "weight_block_size" else inner
            assert "\n" not in (outcome(config | {"quantization_config": quantised | {key: value}}) or "")
