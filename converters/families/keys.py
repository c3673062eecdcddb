"""How a family declares the keys of its config.json, and the one reader of such tables. Knows no family.

A family's table is a frozen dataclass. A field is a key; its default is that of the reference (transformers); its kind
restricts the value. Keys without a field are ignored, as in the reference, but for the one that changes others.
"""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

from rkf.errors import SourceError, UnsupportedError

MAX_SIZE = (1 << 31) - 1
MAX_TEXT = 1024
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LINEAR, CONV = "linear_attention", "conv"
_BY_LAYER = "per_layer_config"  # gives single layers other values of any keys
_MAX_NUMBER = sys.float_info.max
_OLD_TYPES = {"attention": FULL, "mamba": LINEAR}  # words of layer_types in checkpoints of earlier versions
# Values of hidden_act -> activations of ops. The three tanh forms of gelu are the same formula.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "linear": "identity",
}

_Read = Callable[[Any], Any]
C = TypeVar("C")


def read(kind: type[C], config: Mapping[str, Any]) -> C:
    """The table of a config.json. Raises SourceError or UnsupportedError that names the key."""
    found: dict[str, Any] = {}
    if config.get(_BY_LAYER) and _BY_LAYER not in (key.name for key in fields(kind)):  # type: ignore[arg-type]
        raise UnsupportedError(f"{_BY_LAYER}: layers with keys of their own are not supported in this architecture")
    for key in fields(kind):  # type: ignore[arg-type]
        # The first that is there counts: `name` is the one that the reference sets last (its attribute_map).
        names = (key.metadata["name"] or key.name, *key.metadata["aliases"])
        name = next((name for name in names if name in config), None)
        if name is None:
            continue
        try:
            found[key.name] = key.metadata["read"](config[name])
        except _WrongError as wrong:
            raise SourceError(f"{name}: expected {wrong.expected}, got {reprlib.repr(config[name])}") from None
    return kind(**found)


# --- kinds of keys: functions of the default; "optional" ones may also be null


def size(default: int, aliases: tuple[str, ...] = (), most: int = MAX_SIZE, name: str | None = None) -> Any:
    """An integer of at least 1, at the key `name` if the field has another one."""
    return _key(default, _whole(1, most), aliases, name)


def optional_size(default: int | None = None, aliases: tuple[str, ...] = ()) -> Any:
    return _key(default, _or_null(_whole(1, MAX_SIZE)), aliases)


def count(default: int) -> Any:
    """An integer of at least 0."""
    return _key(default, _whole(0, MAX_SIZE))


def optional_count(default: int | None = None) -> Any:
    """An integer of at least 0, or null."""
    return _key(default, _or_null(_whole(0, MAX_SIZE)))


def unused_size(default: int) -> Any:
    """An integer of at least 1; None for null and 0."""
    return _key(default, lambda value: None if value is None else _whole(0, MAX_SIZE)(value) or None)


def last_layer() -> Any:
    """The number of a layer; None for -1, the last one."""
    return _key(None, lambda value: None if value == -1 else _whole(0, MAX_SIZE)(value))


def number(default: float, aliases: tuple[str, ...] = (), name: str | None = None) -> Any:
    """A finite number above 0, at the key `name` if the field has another one."""
    return _key(default, _positive, aliases, name)


def optional_number(default: float | None = None, aliases: tuple[str, ...] = ()) -> Any:
    return _key(default, _or_null(_positive), aliases)


def flag(default: bool, or_null: bool = False, aliases: tuple[str, ...] = (), name: str | None = None) -> Any:
    """A boolean. or_null: null is false."""
    reader: _Read = (lambda value: value is not None and _flag(value)) if or_null else _flag
    return _key(default, reader, aliases, name)


def optional_flag() -> Any:
    return _key(None, _or_null(_flag))


def text(default: str) -> Any:
    """A text of at most MAX_TEXT characters, each of them Unicode."""
    return _key(default, _text)


def limits(least: float, most: float) -> Any:
    """A list of two numbers of at least 0, in order; the second is above 0 and may be infinite."""
    return _key((least, most), _limits)


def size_or_auto() -> Any:
    """An integer of at least 1; None for "auto", the default."""
    return _key(None, lambda value: None if value == "auto" else _whole(1, MAX_SIZE)(value))


def word() -> Any:
    """A word, or null."""
    return _key(None, _or_null(_word))


def ignored(value: Any) -> Any:
    """A key that the reference ignores, with the value that it always has."""
    return _key(value, lambda _: value)


def activation(default: str, name: str = "hidden_act", own: str | None = None) -> Any:
    """The name of an activation at the key `name`; its value is the ops' word for it. own: one of this family alone."""
    return _key(
        default if default == own else _ACTIVATIONS[default],
        lambda value: value if own is not None and value == own else _activation(value),
        name=name,
    )


def layer_types(*known: str, aliases: tuple[str, ...] = (), name: str | None = None) -> Any:
    """The kind of each layer, as words (by default: full or sliding attention); null: the family's own pattern."""
    words = known or (FULL, SLIDING)
    return _key(None, _or_null(lambda value: _layer_types(value, words)), aliases, name)


def period(default: int) -> Any:
    """An integer of at least 1. None for what only readers of other implementations understand: 0, null or letters."""
    return _key(
        default, lambda value: None if value in (0, None) or isinstance(value, str) else _whole(1, MAX_SIZE)(value)
    )


def layer_numbers(or_null: bool = False) -> Any:
    """Numbers of layers. or_null: null, the default, differs from none of them."""
    none = None if or_null else ()
    return _key(none, lambda value: none if value is None else _integers(value))


def token(default: int | None) -> Any:
    """A token's id, or null. Some checkpoints have -1 for none, and ids that no row has."""
    return _key(default, _or_null(_integer))


def tokens(*defaults: int, null_is_default: bool = False) -> Any:
    """Ids of tokens: a list, one number, or null (none, or the defaults)."""
    return _key(defaults, lambda value: defaults if value is None and null_is_default else _tokens(value))


def optional_tokens() -> Any:
    """Ids of tokens, as of `tokens`; None for null."""
    return _key(None, _or_null(_tokens))


def table() -> Any:
    """An object, or null; rope.py reads its contents."""
    return _key(None, _or_null(_object))


# --- readers of one value each


class _WrongError(Exception):
    """A value of the wrong kind for its key."""

    def __init__(self, expected: str) -> None:
        self.expected = expected


def _key(default: Any, reader: _Read, aliases: tuple[str, ...] = (), name: str | None = None) -> Any:
    return field(default=default, metadata={"read": reader, "aliases": aliases, "name": name})


def _or_null(reader: _Read) -> _Read:
    return lambda value: None if value is None else reader(value)


def _whole(least: int, most: int) -> _Read:
    def reader(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise _WrongError(f"an integer from {least} to {most}")
        return value

    return reader


def _positive(value: Any) -> float:
    if not is_number(value) or value <= 0:
        raise _WrongError("a number above 0")
    return float(value)


def is_number(value: Any) -> bool:
    """Whether it is a number and finite as a float."""
    return type(value) in (int, float) and -_MAX_NUMBER <= value <= _MAX_NUMBER


def _limits(value: Any) -> tuple[float, float]:
    # transformers 5 writes what JSON has no number for as an object.
    infinity = {"__float__": "Infinity"}
    numbers = [math.inf if each == infinity else each for each in value] if isinstance(value, list) else []
    in_order = (
        len(numbers) == 2
        and all(each == math.inf or is_number(each) for each in numbers)
        and 0 <= numbers[0] <= numbers[1]
        and numbers[0] < math.inf
        and numbers[1] > 0
    )
    if not in_order:
        raise _WrongError("a list of two numbers of at least 0, in order")
    return float(numbers[0]), float(numbers[1])


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise _WrongError("true or false")
    return value


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise _WrongError("a word")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not is_unicode(value):
        raise _WrongError(f"a text of at most {MAX_TEXT} characters")
    return value


def is_unicode(value: str) -> bool:
    """Whether a text of a JSON file has no half of a surrogate pair, which no encoding has."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _activation(value: Any) -> str:
    if not isinstance(value, str):
        raise _WrongError("the name of an activation")
    if value not in _ACTIVATIONS:
        raise UnsupportedError(f"hidden_act: activation {value!r} is not supported; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _layer_types(value: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise _WrongError("a list of a word for each layer")
    given: list[str] = value
    words = tuple(_OLD_TYPES.get(word, word) for word in given)
    for word in words:
        if word not in known:
            raise UnsupportedError(f"layer_types: {word!r} is not supported; known: {', '.join(known)}")
    return words


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise _WrongError("a list of integers")
    return tuple(value)


def _tokens(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(each) is int for each in ids):
        raise _WrongError("a token id or a list of them")
    return tuple(ids)


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise _WrongError("an integer")
    return value


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _WrongError("an object")
    return value
