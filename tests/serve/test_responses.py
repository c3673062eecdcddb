"""/v1/responses: the client's own types accept what comes, and the text is that of chat completions."""

import json

import openai
import pytest
from openai.types.responses import Response

from tests.serve.running import call
from tests.serve.test_answers import WEATHER

PATH = "/v1/responses"
ASKED = {"model": "tiny", "instructions": "Be brief.", "input": "The capital of France?"}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The capital of France?"}]
TOOL = {"type": "function", **WEATHER["function"]}


@pytest.fixture
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_a_response_is_the_chats_answer(client, port, model):
    wanted = model.chat(MESSAGES, max_tokens=20)
    found = client.responses.create(**ASKED, max_output_tokens=20)
    assert (found.output_text, found.status, found.incomplete_details.reason) == (
        wanted,
        "incomplete",
        "max_output_tokens",
    )
    assert (found.usage.output_tokens, found.usage.input_tokens) == (20, model.stream(MESSAGES).stats.prompt_tokens)
    parts = [{"role": "user", "content": [{"type": "input_text", "text": ASKED["input"]}]}]
    again = client.responses.create(**ASKED | {"input": parts}, max_output_tokens=20)
    assert again.output_text == wanted
    status, plain = call(port, PATH, ASKED | {"max_output_tokens": 3})
    assert status == 200
    Response.model_validate(plain)


def test_events_tell_the_same(client, model):
    wanted = model.chat(MESSAGES, max_tokens=20)
    with client.responses.create(**ASKED, max_output_tokens=20, stream=True) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == wanted
    kinds = list(dict.fromkeys(event.type.removeprefix("response.") for event in events))
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert events[-1].response.output_text == wanted
    form = {"format": {"type": "json_schema", "name": "n", "schema": {"enum": ["Paris"]}}}
    with client.responses.stream(**ASKED, text=form) as stream:  # the client puts the events together
        assert stream.get_final_response().output_text == '"Paris"'


def test_a_function_is_called_and_its_output_comes_back(client):
    asked = {"model": "tools", "input": ASKED["input"], "tools": [TOOL], "temperature": 1.0, "max_output_tokens": 400}
    found = client.responses.create(**asked, tool_choice={"type": "function", "name": "weather"})
    (made,) = found.output
    assert (made.type, made.name, found.status) == ("function_call", "weather", "completed")
    assert json.loads(made.arguments)["city"] in ("Paris", "Rome")
    history = [
        {"role": "user", "content": ASKED["input"]},
        made.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": made.call_id, "output": "sunny"},
    ]
    assert client.responses.create(**asked | {"input": history, "max_output_tokens": 3}).usage.output_tokens <= 3


def test_a_schema_holds(client):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    found = client.responses.create(**ASKED, text=form, max_output_tokens=300)
    assert found.status == "incomplete" or json.loads(found.output_text)["n"] in (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": []}, "input: "),
        ({"input": [{"type": "image_generation_call"}]}, "messages and calls of functions"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "no images"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "messages.1.role: "),
        ({"previous_response_id": "resp_1"}, "keeps no responses"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"temperature": -1}, "temperature: "),
    ],
    ids=range(7),
)
def test_what_is_refused(port, change, message):
    status, found = call(port, PATH, ASKED | change)
    assert status == 400 and message in found["error"]["message"]
