"""Reasoning, answer and tool calls in a model's text, for any way in which it arrives."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkf.serve.output_forms import OutputForms

FORMS = OutputForms(("<think>", "</think>"), ("<tool_call>", "</tool_call>"))
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": [1, "</"]}}\n</tool_call>'
BROKEN = "<tool_call>add(1)</tool_call>"


def split(text, sizes=None, prompt="assistant\n", forms=FORMS, tools=True):
    """(content, reasoning, [(name, arguments)]) of a text that comes in pieces of some sizes."""
    splitter, content, reasoning, calls = forms.splitter(prompt, tools=tools), "", "", []
    at = 0
    for size in [*(sizes or []), len(text)]:
        parts = splitter.push(text[at : at + size])
        content, reasoning, calls = content + parts.content, reasoning + parts.reasoning, [*calls, *parts.calls]
        at += size
    parts = splitter.finish()
    calls += parts.calls
    found = [(call.name, json.loads(call.arguments)) for call in calls]
    assert len({call.id for call in calls}) == len(calls)
    return content + parts.content, reasoning + parts.reasoning, found


ADD = ("add", {"a": [1, "</"]})
WANTED = {
    "Hello <b>": ("Hello <b>", "", []),
    "<think>\nHm <tool_call> \n</think>\n\nYes": ("Yes", "Hm <tool_call> \n", []),
    f"<think>So</think>{CALL}": ("", "So", [ADD]),
    f"I call.{CALL}\n{CALL}": ("I call.", "", [ADD, ADD]),
    f"No: {BROKEN} it": (f"No: {BROKEN[:-12]}it", "", []),
    "<think>never ends": ("", "never ends", []),
    CALL[:-12]: ("", "", [ADD]),
    "<tool_call>never ends": ("<tool_call>never ends", "", []),
    "<tool_ca": ("<tool_ca", "", []),
}


@given(st.sampled_from(sorted(WANTED)), st.lists(st.integers(1, 9), max_size=40))
def test_the_parts_do_not_depend_on_the_pieces(text, sizes):
    assert split(text, sizes) == WANTED[text]


def test_a_prompt_may_open_the_reasoning_or_a_call():
    assert split("Hm</think>\nYes", prompt="assistant\n<think>\n") == ("Yes", "Hm", [])
    assert split('{"name": "f", "arguments": {}}', prompt="<tool_call>\n") == ("", "", [("f", {})])


def test_without_tools_a_call_is_text():
    assert split(CALL, tools=False) == (CALL, "", [])
    assert split(" <think>x", forms=OutputForms()) == (" <think>x", "", [])


OPEN = OutputForms(None, ("[TOOL_CALLS]", ""))


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "parameters": {}}]', [("f", {"a": 1}), ("g", {})]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [("f", {"a": 1})]),
        ('f[ARGS]{"a": [1]}[TOOL_CALLS]g{}', [("f", {"a": [1]}), ("g", {})]),
        (
            "<function=f>\n<parameter=a>\n3\n</parameter>\n<parameter=b>\nx y\n</parameter>\n</function>",
            [("f", {"a": 3, "b": "x y"})],
        ),
        (
            "f\n<arg_key>a</arg_key>\n<arg_value>true</arg_value>\n<arg_key>b</arg_key><arg_value>x</arg_value>",
            [("f", {"a": True, "b": "x"})],
        ),
        (
            '<function=f><parameter=a>NaN</parameter><parameter=b>"\\ud800"</parameter></function>',
            [("f", {"a": "NaN", "b": '"\\ud800"'})],
        ),
    ],
    ids=range(6),
)
def test_calls_of_every_form(text, calls):
    assert split("Now" + "[TOOL_CALLS]" + text, [3] * 20, forms=OPEN) == ("Now", "", calls)


@pytest.mark.parametrize(
    "text", ["[1]", '{"name": 3}', '[{"name": "f", "arguments": "{"}]', "f(1)", "[" * 20000, "f{nothing}", ""]
)
def test_what_is_no_call_is_text(text):
    assert split("[TOOL_CALLS]" + text, forms=OPEN) == ("[TOOL_CALLS]" + text, "", [])


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '"\\ud800"', '{"\\udfff": 1}'])
@pytest.mark.parametrize("form", ['{{"name": "f", "arguments": {{"a": {}}}}}', 'f[ARGS]{{"a": {}}}'])
def test_what_json_cannot_hold_is_no_call(form, value):
    text = "[TOOL_CALLS]" + form.format(value)
    assert split(text, forms=OPEN) == (text, "", [])
