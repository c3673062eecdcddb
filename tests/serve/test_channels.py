"""Answers in channels: reasoning, answer and calls told apart in any pieces, and through the `openai` client."""

import json

import jsonschema
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkf.serve.output_forms import OutputForms
from tests.serve import channel_model
from tests.serve.running import running
from tests.serve.test_answers import MESSAGES, WEATHER
from tests.serve.test_output_forms import split

FORMS = OutputForms(special=True, in_channels=True)
START = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
THOUGHT = "<|channel|>analysis<|message|>Hm < b.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Yes."
CALL = '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": [1, "<|"]}<|call|>'
OTHER = '<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": [1, "<|"]}<|call|>'
ADD = ("add", {"a": [1, "<|"]})
WANTED = {
    THOUGHT + FINAL: ("Yes.", "Hm < b.", []),
    THOUGHT + FINAL + "<|return|>": ("Yes.", "Hm < b.", []),
    THOUGHT + CALL: ("", "Hm < b.", [ADD]),
    THOUGHT + OTHER: ("", "Hm < b.", [ADD]),
    THOUGHT + CALL[:-8]: ("", "Hm < b.", [ADD]),
    THOUGHT + CALL + OTHER: ("", "Hm < b.", [ADD, ADD]),
    "<|channel|>commentary<|message|>I add.<|end|>" + CALL: ("I add.", "", [ADD]),
    "<|channel|>analysis<|message|>one<|channel|>final<|message|>two": ("two", "one", []),
    "<|channel|>analysis<|message|>never ends <|e": ("", "never ends <|e", []),
    "<|channel|>final<|message|>": ("", "", []),
    "<|channel|>fin": ("", "", []),
    "No channel.": ("No channel.", "", []),
    " to=functions.add<|channel|>commentary json<|message|>{broken": ("{broken", "", []),
}


@given(st.sampled_from(sorted(WANTED)), st.lists(st.integers(1, 9), max_size=60))
def test_the_parts_do_not_depend_on_the_pieces(text, sizes):
    assert split(text, sizes, START, FORMS) == WANTED[text]


def test_a_prompt_may_hold_the_header_or_a_part_of_it():
    assert split("Yes", prompt=START + "<|channel|>final<|message|>", forms=FORMS) == ("Yes", "", [])
    text = 'add<|channel|>commentary json<|message|>{"a": [1, "<|"]}'
    assert split(text, prompt=START + " to=functions.", forms=FORMS) == ("", "", [ADD])


def test_without_tools_a_call_is_text():
    assert split(CALL, prompt=START, forms=FORMS, tools=False) == ('{"a": [1, "<|"]}', "", [])


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    path = channel_model.write(tmp_path_factory.mktemp("channels") / "m.rkf")
    with (
        running({"m": path}) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as found,
    ):
        yield found


def test_a_required_call_names_one_of_the_functions(client):
    other = {
        "type": "function",
        "function": {"name": "time", "parameters": {"$ref": "#/$defs/t", "$defs": {"t": {"enum": [7]}}}},
    }
    names = set()
    for seed in range(6):
        found = client.chat.completions.create(
            model="m",
            messages=MESSAGES,
            tools=[WEATHER, other],
            tool_choice="required",
            max_tokens=400,
            temperature=1.0,
            seed=seed,
        ).choices[0]
        assert found.finish_reason == "tool_calls", found
        (made,) = found.message.tool_calls
        names.add(made.function.name)
        schema = WEATHER if made.function.name == "weather" else other
        jsonschema.validate(json.loads(made.function.arguments), schema["function"]["parameters"])
        history = [*MESSAGES, {**found.message.model_dump(exclude_none=True), "reasoning_content": "Hm."}]
        history.append({"role": "tool", "tool_call_id": made.id, "content": "sunny"})
        client.chat.completions.create(model="m", messages=history, max_tokens=3)
    assert names == {"weather", "time"}


def test_an_answer_of_a_form_is_the_final_one(client):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["Paris"]}}}
    found = client.chat.completions.create(model="m", messages=MESSAGES, response_format=form, max_tokens=50).choices[0]
    assert (found.message.content, found.finish_reason) == ('"Paris"', "stop")
