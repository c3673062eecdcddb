"""Calls of functions as models write them between their markers. Whatever is of no known form is no call."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from secrets import token_hex
from typing import Any, NamedTuple

from rkf.runtime.guide import Form, json_part

_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|$)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_PAIR = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_NAMED = re.compile(r"([\w.-]+)\s*(?:\[ARGS\])?\s*(\{.*\})", re.DOTALL)


class Call(NamedTuple):
    """A call of a function. arguments: JSON."""

    id: str
    name: str
    arguments: str


def read_calls(text: str) -> Sequence[Call]:
    """The calls in the text between two markers; none if it is of no known form."""
    text = text.strip()
    try:
        return _of_json(_value(text))
    except (ValueError, RecursionError):
        pass
    if functions := _FUNCTION.findall(text):
        return [_call(name, dict(map(_pair, _PARAMETER.findall(inner)))) for name, inner in functions]
    name, _, rest = text.partition("<arg_key>")
    if rest and re.fullmatch(r"[\w.-]+", name.strip()):
        return [_call(name.strip(), dict(map(_pair, _PAIR.findall(text))))]
    if named := _NAMED.fullmatch(text):
        try:
            return [_call(named[1], _value(named[2]))]
        except (ValueError, RecursionError):
            return []
    return []


def call_of(name: str, arguments: str) -> Call | None:
    """A call with arguments as text; None: they are not JSON."""
    try:
        return _call(name, _value(arguments))
    except (ValueError, RecursionError):
        return None


def call_grammar(tools: Mapping[str, Mapping[str, Any]], before: str, between: str, after: str) -> Form:
    """The form of a call of one of some functions: the name, then arguments of its schema, each whole by itself.

    before, after: texts around them; between: a part of the grammar.
    """
    lines = ["start: " + " | ".join(f"call_{number}" for number in range(len(tools)))]
    for number, (name, schema) in enumerate(tools.items()):
        parts = [json.dumps(before + name), between, f"arguments_{number}", json.dumps(after) if after else ""]
        lines += [f"call_{number}: {' '.join(parts)}", f"arguments_{number}: {json_part(schema)}"]
    return Form("grammar", "\n".join(lines))


def _of_json(read: Any) -> Sequence[Call]:
    """One object or a list of them: {"name": …, "arguments" or "parameters": an object, or one as text}."""
    found = []
    for each in read if isinstance(read, list) else [read]:
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            return []
        arguments = each.get("arguments", each.get("parameters")) or {}
        found.append(_call(each["name"], _value(arguments) if isinstance(arguments, str) else arguments))
    return found


def _value(text: str) -> Any:
    """The value of a JSON text. ValueError also for what Python reads and a reply cannot hold: NaN, infinite numbers
    and halves of surrogate pairs.
    """
    found = json.loads(text)
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    return found


def _call(name: str, arguments: Any) -> Call:
    return Call("call_" + token_hex(12), name, json.dumps(arguments, ensure_ascii=False))


def _pair(found: tuple[str, str]) -> tuple[str, Any]:
    """A name and its value, which is JSON or a text."""
    name, value = found
    try:
        return name.strip(), _value(value)
    except (ValueError, RecursionError):
        return name.strip(), value
