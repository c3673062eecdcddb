"""Every JSON answer against OpenAI's published schemas and the models of the `openai` package: nothing missing, nothing
of another type, and no field beyond theirs but `reasoning_content`.
"""

import json

import pytest
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.shared import ErrorObject
from pydantic import BaseModel, TypeAdapter

from tests.serve import openai_schemas
from tests.serve.running import call, events, typed_events
from tests.serve.test_answers import MESSAGES, WEATHER

CHAT = {"model": "tools", "messages": MESSAGES, "max_tokens": 4}
TEXT = {"model": "tiny", "prompt": ["The", "A"], "max_tokens": 3}
RESPONSE = {"model": "tools", "input": "The capital?", "max_output_tokens": 4}
FLAT_TOOL = {"type": "function", **WEATHER["function"], "strict": True}
THOUGHT = {"type": "regex", "regex": r"<think>So\.</think>Yes"}
CHATS = {
    "plain": {},
    "counted": {"stream_options": {"include_usage": True}, "n": 2, "stop": "e"},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "tool": {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 400, "temperature": 1.0, "seed": 1},
    "thought": {"response_format": THOUGHT, "max_tokens": 90},
}
RESPONSES = {
    "plain": {},
    "whole": {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 1, "instructions": "Be brief."},
    "schema": {
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"enum": [1]}}},
        "temperature": 0.5,
        "top_p": 0.9,
        "reasoning": {"effort": "low"},
        "metadata": {"a": "b"},
    },
    "logprobs": {"top_logprobs": 3},
    "tool": {"tools": [FLAT_TOOL], "tool_choice": "required", "max_output_tokens": 400, "temperature": 1.0},
    "named tool": {
        "tools": [FLAT_TOOL],
        "tool_choice": {"type": "function", "name": "weather"},
        "max_output_tokens": 400,
    },
    "thought": {"text": {"format": THOUGHT}, "max_output_tokens": 90},
}


def assert_shape(name, shape, answer):
    openai_schemas.check(name, answer)
    extra = unknown(TypeAdapter(shape).validate_json(json.dumps(answer), strict=True))
    named = {"name"} if answer.get("type") == "response.function_call_arguments.done" else set()  # only in the schema
    assert extra <= {"reasoning_content"} | named


def unknown(found):
    """The names of fields that the package's models do not have."""
    if isinstance(found, BaseModel):
        inside = [unknown(getattr(found, name)) for name in type(found).model_fields]
        return set(found.model_extra or ()).union(*inside)
    return set().union(*map(unknown, found)) if isinstance(found, list) else set()


def plain(response):
    """A response without the one form that is not OpenAI's."""
    form = {"type": "text"} if response["text"]["format"]["type"] == "regex" else response["text"]["format"]
    return {**response, "text": {"format": form}}


@pytest.mark.parametrize("change", CHATS.values(), ids=CHATS)
def test_chats(port, change):
    status, found = call(port, "/v1/chat/completions", CHAT | change)
    assert status == 200
    assert_shape("CreateChatCompletionResponse", ChatCompletion, found)
    for chunk in events(port, "/v1/chat/completions", CHAT | change):
        assert_shape("CreateChatCompletionStreamResponse", ChatCompletionChunk, chunk)
    message = found["choices"][0]["message"]
    assert ("tool_calls" in message) == ("tools" in change)
    assert message.get("reasoning_content") == ("So." if "response_format" in change else None)


@pytest.mark.parametrize(
    "change", [{}, {"logprobs": 2, "n": 2}, {"stream_options": {"include_usage": True}}, {"echo": True}], ids=range(4)
)
def test_completions(port, change):
    status, found = call(port, "/v1/completions", TEXT | change)
    assert status == 200
    assert_shape("CreateCompletionResponse", Completion, found)
    for chunk in events(port, "/v1/completions", TEXT | change):
        # OpenAI's schema is of whole answers: in its chunks, too, the reason is null until the last.
        choices = [{**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]]
        assert_shape("CreateCompletionResponse", Completion, {**chunk, "choices": choices})


@pytest.mark.parametrize("change", RESPONSES.values(), ids=RESPONSES)
def test_responses(port, change):
    status, found = call(port, "/v1/responses", RESPONSE | change)
    assert status == 200, found
    assert_shape("Response", Response, plain(found))
    kinds = [item["type"] for item in found["output"]]
    assert ("function_call" in kinds, "reasoning" in kinds) == ("tools" in change, change == RESPONSES["thought"])
    for event in typed_events(port, "/v1/responses", RESPONSE | change):
        if "response" in event:
            event["response"] = plain(event["response"])
        assert_shape("ResponseStreamEvent", ResponseStreamEvent, event)


def test_embeddings(port):
    for encoding in ("float", "base64"):
        found = call(port, "/v1/embeddings", {"model": "tiny", "input": ["a", "b"], "encoding_format": encoding})[1]
        if encoding == "float":  # OpenAI's schema has no base64
            assert_shape("CreateEmbeddingResponse", CreateEmbeddingResponse, found)


def test_models(port):
    _, found = call(port, "/v1/models")
    openai_schemas.check("ListModelsResponse", found)
    for model in found["data"]:
        assert_shape("Model", Model, model)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "tiny"}),
        ("/v1/embeddings", {"model": "none", "input": "x"}),
        ("/v1/nothing", None),
        ("/v1/responses", b"{"),
    ],
    ids=range(4),
)
def test_errors(port, path, body):
    status, found = call(port, path, body)
    assert status >= 400
    openai_schemas.check("ErrorResponse", found)
    assert set(found) == {"error"} and not unknown(ErrorObject.model_validate(found["error"], strict=True))
