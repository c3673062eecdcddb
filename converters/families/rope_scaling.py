"""Every kind of rope scaling -> explicit frequencies. Knows the keys of rope_parameters, and no family.

The arithmetic is that of transformers' modeling_rope_utils.py, in f32. Sources: linear (kaiokendev), yarn
(arXiv 2309.00071), longrope (arXiv 2402.13753), llama3 (Llama 3.1's own code).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.keys import FULL, is_number
from rkf.errors import SourceError, UnsupportedError
from rkf.model.frequencies import Frequencies
from rkf.model.op_maps import MAX_FREQUENCIES

F32 = NDArray[np.float32]
# Kinds whose original_max_position_embeddings defaults to max_position_embeddings.
STRETCHED = ("llama3", "longrope", "yarn")


def parameters(config: DecoderKeys) -> dict[str, Any]:
    """rope_parameters in the form of transformers 5, from that form or from that of earlier versions.

    A non-empty rope_scaling replaces rope_parameters; values missing from both come from top-level keys.
    """
    return standard({**(config.rope_scaling or config.rope_parameters or {})}, config)


def standard(rope: dict[str, Any], config: DecoderKeys) -> dict[str, Any]:
    """One object of rope parameters with its missing keys filled in.

    SourceError for one that holds an object for each kind of layer, which some families have and others do not read.
    """
    if nested := next((key for key, value in rope.items() if isinstance(value, dict)), None):
        raise SourceError(f"rope_parameters: expected the same for all layers, got an object at {reprlib.repr(nested)}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    found = {"rope_theta": config.rope_theta, "partial_rotary_factor": config.partial_rotary_factor or 1.0} | rope
    if kind in STRETCHED:
        inside = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        found["original_max_position_embeddings"] = config.original_max_position_embeddings or inside
    return found | {"rope_type": kind}


def spelt(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a config.json with the same meaning for transformers 5 (rope_parameters) and for earlier versions."""
    beside = ("rope_type", "rope_theta", "partial_rotary_factor")
    scaling = {"type": rope["rope_type"], **{key: value for key, value in rope.items() if key not in beside}}
    found = {key: rope[key] for key in beside[1:] if key in rope}
    return {"rope_parameters": dict(rope), "rope_scaling": None if rope["rope_type"] == "default" else scaling} | found


def whole_heads(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters for a family whose rope always rotates whole heads.

    For the kind "default" the reference ignores partial_rotary_factor there; for any other it fails.
    """
    if rope["rope_type"] != "default" and rope["partial_rotary_factor"] != 1:
        raise UnsupportedError(
            f"partial_rotary_factor: {rope['partial_rotary_factor']!r} is not supported "
            f"with rope type {rope['rope_type']!r}; expected 1"
        )
    return {**rope, "partial_rotary_factor": 1.0}


def whole(config: DecoderKeys) -> dict[str, Any]:
    """`parameters` for a family whose rope always rotates whole heads."""
    return whole_heads(parameters(config))


def by_kind(config: DecoderKeys, thetas: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Standard parameters by kind of layer, from rope_parameters that has an object for each kind.

    thetas: rope_theta where it is absent. rope_scaling applies only to layers without a window. Here the reference
    ignores a top-level original_max_position_embeddings, and reads truncate (of yarn) only beside the objects.
    """
    given, scaling = dict(config.rope_parameters or {}), config.rope_scaling or {}
    if config.rope_parameters is None and "rope_type" not in scaling and scaling.get("type", "default") != "default":
        # transformers 5 reads the kind "default" here, and earlier versions the old word.
        raise UnsupportedError(f"rope_scaling: type {scaling['type']!r} without rope_type is not supported here")
    beside = replace(config, original_max_position_embeddings=None)
    found: dict[str, dict[str, Any]] = {}
    for kind, theta in thetas.items():
        inner = given.get(kind) or {}
        if not isinstance(inner, dict):
            raise SourceError(f"rope_parameters, {kind}: expected an object, got {reprlib.repr(inner)}")
        if kind == FULL:
            inner = inner | dict(scaling)
        own = {"rope_theta": theta} | inner | {"truncate": given.get("truncate", True)}
        found[kind] = whole_heads(standard(own, beside))
    return found


def tables(ropes: Mapping[str, Mapping[str, Any]], kinds: Sequence[str], config: DecoderKeys) -> dict[str, Frequencies]:
    """Frequencies of the kinds that occur, in the order of the layers."""
    return {kind: table(ropes[kind], config) for kind in dict.fromkeys(kinds)}


def table(rope: Mapping[str, Any], config: DecoderKeys) -> Frequencies:
    """The frequencies of one object of standard parameters, for heads and contexts of the usual keys."""
    return frequencies(rope, config.head_size, config.max_position_embeddings)


def frequencies(rope: Mapping[str, Any], head_size: int, context: int) -> Frequencies:
    """The frequencies of one object of standard parameters. context: max_position_embeddings.

    Raises UnsupportedError for an unknown kind, SourceError for a number that is missing or wrong.
    """
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UnsupportedError(f"rope scaling {kind!r} is not supported; known: {', '.join(_KINDS)}")
    turned = int(head_size * positive(rope, "partial_rotary_factor"))
    if not 2 <= turned <= min(head_size, 2 * MAX_FREQUENCIES) or turned % 2:
        most = min(head_size, 2 * MAX_FREQUENCIES)
        raise SourceError(f"rope: expected an even number of rotated values per head, at most {most}, got {turned}")
    try:
        with np.errstate(all="ignore"):
            found = _KINDS[kind](rope, turned, head_size, context)
    except (ArithmeticError, ValueError):  # of Python's own functions, at the edges of floats
        found = None
    if found is None or not np.isfinite((*found.frequencies, found.factor, *(found.long or ()))).all():
        raise SourceError(f"rope: these parameters give frequencies that are no numbers: {reprlib.repr(dict(rope))}")
    return found


def _powers(rope: Mapping[str, Any], numbers: int, over: int) -> F32:
    """theta ** (2i / over), f32[numbers / 2]."""
    exponents = np.arange(0, numbers, 2, dtype=np.float32) / np.float32(over)
    return (np.float32(positive(rope, "rope_theta")) ** exponents).astype(np.float32)


def _plain(rope: Mapping[str, Any], turned: int) -> F32:
    return (1 / _powers(rope, turned, turned)).astype(np.float32)


def _default(rope: Mapping[str, Any], turned: int, head_size: int, context: int) -> Frequencies:
    return _table(_plain(rope, turned))


def _dynamic(rope: Mapping[str, Any], turned: int, head_size: int, context: int) -> Frequencies:
    """The plain frequencies, valid within max_position_embeddings, which rkf never exceeds."""
    positive(rope, "factor")
    return _table(_plain(rope, turned))


def _linear(rope: Mapping[str, Any], turned: int, head_size: int, context: int) -> Frequencies:
    return _table(_plain(rope, turned) / np.float32(positive(rope, "factor")))


def _llama3(rope: Mapping[str, Any], turned: int, head_size: int, context: int) -> Frequencies:
    """Long waves are stretched, short ones kept, those between blended by their rotations in the old context."""
    factor, old = positive(rope, "factor"), positive(rope, "original_max_position_embeddings")
    low, high = positive(rope, "low_freq_factor"), positive(rope, "high_freq_factor")
    if low >= high:
        raise SourceError(f"rope scaling: low_freq_factor: expected less than high_freq_factor ({high}), got {low}")
    plain = _plain(rope, turned)
    wavelength = 2 * np.pi / plain
    blend = np.clip((old / wavelength - low) / (high - low), 0, 1)
    return _table(((1 - blend) * plain / factor + blend * plain).astype(np.float32))


def _proportional(rope: Mapping[str, Any], turned: int, head_size: int, context: int) -> Frequencies:
    """Part of the pairs of the whole head rotate; the others have frequency 0."""
    pairs = int(positive(rope, "partial_rotary_factor") * head_size // 2)
    found = np.zeros(head_size // 2, np.float32)
    found[:pairs] = 1 / _powers(rope, 2 * pairs, head_size)
    return _table(found / np.float32(positive(rope, "factor", 1.0)))


def _yarn(rope: Mapping[str, Any], turned: int, head_size: int, context: int) -> Frequencies:
    """Short waves are kept, long ones stretched; a ramp over the pair numbers blends those between."""
    old, theta = positive(rope, "original_max_position_embeddings"), positive(rope, "rope_theta")
    # In the reference null is the growth of the context, and a missing factor an error.
    factor = context / old if rope.get("factor", 0) is None else positive(rope, "factor")

    def edge(turns: float) -> float:
        return turned * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = edge(positive(rope, "beta_fast", 32)), edge(positive(rope, "beta_slow", 1))
    truncate = rope.get("truncate", True)
    if type(truncate) is not bool:
        raise SourceError(f"rope scaling: truncate: expected true or false, got {reprlib.repr(truncate)}")
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(turned // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    powers = _powers(rope, turned, turned)
    kept = 1 - ramp
    found = 1 / (np.float32(factor) * powers) * (1 - kept) + 1 / powers * kept
    return _table(found, yarn_attention(rope, factor))


def yarn_attention(rope: Mapping[str, Any], factor: float) -> float:
    """What yarn multiplies queries and keys by."""
    if rope.get("attention_factor") is not None:
        return positive(rope, "attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(rope, "mscale", factor) / grown(rope, "mscale_all_dim", factor)
    return grown({}, "mscale", factor)


def grown(rope: Mapping[str, Any], key: str, factor: float) -> float:
    """What yarn multiplies by for a scale, 1 where the key is absent. factor: how many times the context has grown."""
    scale = positive(rope, key, 1.0)
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(rope: Mapping[str, Any], turned: int, head_size: int, context: int) -> Frequencies:
    """A divisor per pair: one list within the original context, another for longer sequences."""
    old = int(positive(rope, "original_max_position_embeddings"))
    factor = positive(rope, "factor") if rope.get("factor") is not None else context / old
    if rope.get("attention_factor") is not None:
        attention = positive(rope, "attention_factor")
    else:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
    powers = _powers(rope, turned, turned)
    short, long = (1 / (_divisors(rope, key, turned // 2) * powers) for key in ("short_factor", "long_factor"))
    return Frequencies(_floats(short), attention, _floats(long), old)


_KINDS: Mapping[str, Callable[[Mapping[str, Any], int, int, int], Frequencies]] = {
    "default": _default,
    "dynamic": _dynamic,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
    "yarn": _yarn,
}


def positive(rope: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number of the parameters; SourceError for one that is missing or not above 0."""
    value: Any = rope.get(key)
    value = default if value is None else value
    if not is_number(value) or value <= 0:
        raise SourceError(f"rope scaling: {key}: expected a positive number, got {reprlib.repr(value)}")
    return float(value)


def _divisors(rope: Mapping[str, Any], key: str, count: int) -> F32:
    values = rope.get(key)
    if not isinstance(values, list) or len(values) != count:
        raise SourceError(f"rope scaling: {key}: expected {count} numbers, got {reprlib.repr(values)}")
    return np.array([positive({key: value}, key) for value in values], np.float32)


def _table(found: NDArray[Any], factor: float = 1.0) -> Frequencies:
    return Frequencies(_floats(found), factor)


def _floats(found: NDArray[Any]) -> tuple[float, ...]:
    return tuple(float(each) for each in found.astype(np.float32))
