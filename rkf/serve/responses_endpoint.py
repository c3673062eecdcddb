"""POST /v1/responses: answers as items and typed events. Nothing is kept between requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from secrets import token_hex
from time import time
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rkf.serve.chat_endpoint import Conversation
from rkf.serve.refusals import invalid
from rkf.serve.replies import EventStream, Serving, whole
from rkf.serve.shapes import ResponsesRequest

Event = dict[str, Any]


async def responses(request: HttpRequest) -> Response:
    """The endpoint."""
    serving: Serving = request.app.state.serving
    asked = await serving.read(request, ResponsesRequest)
    try:
        chat = asked.as_chat
    except ValidationError as error:
        raise invalid(error) from None
    conversation = await Conversation.begun(serving, chat)
    made = _Made(asked, conversation)
    if asked.stream:
        return EventStream(serving, conversation.served, conversation.reply, _numbered(made), typed=True)
    return JSONResponse(await whole(request, conversation.served, conversation.reply, made.complete()))


class _Made:
    """A response as it grows: its items, and the events that tell of them."""

    def __init__(self, asked: ResponsesRequest, conversation: Conversation) -> None:
        self._conversation = conversation
        self._items: list[dict[str, Any]] = []
        form = (
            asked.text.format.model_dump(by_alias=True, exclude_none=True) if asked.text and asked.text.format else None
        )
        self._response: dict[str, Any] = {
            "id": f"resp_{token_hex(24)}",
            "object": "response",
            "created_at": int(time()),
            "model": conversation.served.name,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "output": self._items,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None},
            "temperature": asked.temperature,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": asked.model_dump(include={"tool_choice"})["tool_choice"] or "auto",
            "tools": [{"strict": False, **tool.model_dump(exclude_none=True)} for tool in asked.tools or ()],
            "top_p": asked.top_p,
            "truncation": "disabled",
        }

    async def complete(self) -> dict[str, Any]:
        """The whole response."""
        async for _ in self.events():
            pass
        return self._response

    async def events(self) -> AsyncIterator[Event | None]:
        """Its events in order; None is a sign of life."""
        yield {"type": "response.created", "response": self._snapshot()}
        yield {"type": "response.in_progress", "response": self._snapshot()}
        finish: str | None = None
        async for found in self._conversation.deltas():
            if found is None:
                yield None
                continue
            _, delta, logprobs, finish = found
            for event in self._grown(delta, [_with_bytes(told) for told in logprobs]):
                yield event
        for event in self._closed(cut=finish == "length"):
            yield event
        told = self._conversation.usage
        self._response["usage"] = {
            "input_tokens": told["prompt_tokens"],
            "input_tokens_details": {**told["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": told["completion_tokens"],
            "output_tokens_details": told["completion_tokens_details"],
            "total_tokens": told["total_tokens"],
        }
        cut = finish == "length"
        self._response["status"] = "incomplete" if cut else "completed"
        self._response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        yield {"type": f"response.{self._response['status']}", "response": self._snapshot()}

    def _snapshot(self) -> dict[str, Any]:
        return {**self._response, "output": list(self._items)}

    def _grown(self, delta: dict[str, Any], logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        if "reasoning_content" in delta:
            yield from self._text("reasoning", delta["reasoning_content"])
        if "content" in delta:
            yield from self._text("message", delta["content"], logprobs)
        for call in delta.get("tool_calls", ()):
            yield from self._closed()
            yield from self._called(call)

    def _text(self, kind: str, text: str, logprobs: list[dict[str, Any]] | None = None) -> Iterator[Event]:
        """Add text to the open item, or to a new one if that is of another kind."""
        if not self._items or self._items[-1]["type"] != kind or self._items[-1]["status"] != "in_progress":
            yield from self._closed()
            yield from self._opened(kind)
        part = self._items[-1]["content"][0]
        part["text"] += text
        event = {**self._place(), "content_index": 0, "delta": text}
        if kind == "message":
            part["logprobs"] += logprobs or []
            yield {"type": "response.output_text.delta", **event, "logprobs": _without_bytes(logprobs or [])}
        else:
            yield {"type": "response.reasoning_text.delta", **event}

    def _opened(self, kind: str) -> Iterator[Event]:
        item: dict[str, Any] = {"id": f"{kind[:3]}_{token_hex(12)}", "type": kind, "status": "in_progress"}
        item |= {"role": "assistant", "content": []} if kind == "message" else {"summary": [], "content": []}
        self._items.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self._items) - 1, "item": dict(item)}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            part = {"type": "reasoning_text", "text": ""}
        item["content"] = [part]
        yield {"type": "response.content_part.added", **self._place(), "content_index": 0, "part": dict(part)}

    def _called(self, call: dict[str, Any]) -> Iterator[Event]:
        item: dict[str, Any] = {
            "id": f"fc_{token_hex(12)}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": "",
        }
        self._items.append(item)
        at = {"item_id": item["id"], "output_index": len(self._items) - 1}
        yield {"type": "response.output_item.added", "output_index": at["output_index"], "item": dict(item)}
        item["arguments"] = call["function"]["arguments"]
        yield {"type": "response.function_call_arguments.delta", **at, "delta": item["arguments"]}
        yield {
            "type": "response.function_call_arguments.done",
            **at,
            "arguments": item["arguments"],
            "name": item["name"],
        }
        item["status"] = "completed"
        yield {"type": "response.output_item.done", "output_index": at["output_index"], "item": dict(item)}

    def _closed(self, *, cut: bool = False) -> Iterator[Event]:
        """End the open item, if there is one."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        part, at = item["content"][0], {**self._place(), "content_index": 0}
        item["status"] = "incomplete" if cut else "completed"
        if item["type"] == "message":
            told = _without_bytes(part["logprobs"])
            yield {"type": "response.output_text.done", **at, "text": part["text"], "logprobs": told}
        else:
            yield {"type": "response.reasoning_text.done", **at, "text": part["text"]}
        yield {"type": "response.content_part.done", **at, "part": part}
        yield {"type": "response.output_item.done", "output_index": len(self._items) - 1, "item": item}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}


def _with_bytes(told: dict[str, Any]) -> dict[str, Any]:
    """A log-probability of chat completions as one of responses, whose bytes may be empty but not null."""
    found = {**told, "bytes": told["bytes"] or []}
    if "top_logprobs" in told:
        found["top_logprobs"] = [_with_bytes(top) for top in told["top_logprobs"]]
    return found


def _without_bytes(logprobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log-probabilities as events of text tell them."""
    found = [{key: value for key, value in told.items() if key != "bytes"} for told in logprobs]
    return [
        told | ({"top_logprobs": _without_bytes(told["top_logprobs"])} if "top_logprobs" in told else {})
        for told in found
    ]


async def _numbered(made: _Made) -> AsyncIterator[Event | None]:
    number = 0
    async for event in made.events():
        if event is None:
            yield None
        else:
            yield {**event, "sequence_number": number}
            number += 1
