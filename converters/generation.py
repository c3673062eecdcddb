"""generation_config.json: the tokens that end an answer, and the options that its authors recommend."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkf.converters.families.keys import flag, is_number, optional_tokens, read
from rkf.converters.input_files import read_json
from rkf.errors import naming

GENERATION = "generation_config.json"
# Without do_sample the reference is greedy, and only the last option has an effect.
SAMPLING, PENALTY = ("temperature", "top_k", "top_p", "min_p"), "repetition_penalty"
# What the reference takes; a top_k below 1 turns it off there.
_EXPECTED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a number of at least 0", lambda value: value >= 0),
    "top_k": ("an integer", lambda value: value == int(value)),
    "top_p": ("a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "min_p": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
    PENALTY: ("a number above 0", lambda value: value > 0),
}
# Options of the reference that rkf does not have, with the number that turns each off; null and empty values do too.
_UNKNOWN = {
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty"), 0),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), None),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "penalty_alpha", "sequence_bias"), 0),
    **dict.fromkeys(("stop_strings", "suppress_tokens"), 0),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beams"), 1),
}
_UNKNOWN_SAMPLING = {"epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": None, "typical_p": 1}
_NEUTRAL = {"temperature": 1, "top_k": 50, "top_p": 1, "min_p": 0} | _UNKNOWN_SAMPLING  # said without do_sample
_DEFAULTS = {"temperature": 1.0, "top_k": 50.0}  # of the reference, where do_sample is true


@dataclass(frozen=True, kw_only=True)
class _Keys:
    eos_token_id: tuple[int, ...] | None = optional_tokens()
    do_sample: bool = flag(False, or_null=True)


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """ends: ids of tokens, None if the file names none. options: name -> number. notes: lines about what is ignored."""

    ends: tuple[int, ...] | None
    options: dict[str, float]
    notes: tuple[str, ...]


def generation_of(folder: Path) -> GenerationConfig:
    """The generation_config.json of a folder, which may be absent. Raises SourceError that names the key."""
    content = read_json(folder / GENERATION, optional=True)
    with naming(folder / GENERATION):
        keys = read(_Keys, content)
    names = (*(SAMPLING if keys.do_sample else ()), PENALTY)
    given: dict[str, Any] = {name: content[name] for name in names if content.get(name) is not None}
    options = {
        name: float(value) for name, value in given.items() if is_number(value) and _EXPECTED[name][1](float(value))
    }
    notes = [
        f"{GENERATION}: {name}: expected {_EXPECTED[name][0]}, got {reprlib.repr(value)}; it is ignored"
        for name, value in given.items()
        if name not in options
    ]
    if unknown := _asked(content, _UNKNOWN | (_UNKNOWN_SAMPLING if keys.do_sample else {})):
        notes.append(f"{GENERATION}: {unknown}: not known to rkf; ignored")
    if not keys.do_sample and (idle := _asked(content, _NEUTRAL)):
        notes.append(f"{GENERATION}: {idle}: of no effect without do_sample, so texts are greedy")
    return GenerationConfig(keys.eos_token_id, (_DEFAULTS if keys.do_sample else {}) | options, tuple(notes))


def _asked(content: Mapping[str, Any], neutral: Mapping[str, int | None]) -> str:
    """The names of the options that ask for something. neutral: name -> the number that does not."""
    empty: tuple[Any, ...] = (None, [], {}, "")
    return ", ".join(
        sorted(name for name, off in neutral.items() if (value := content.get(name)) not in empty and value != off)
    )
