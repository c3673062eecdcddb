"""POST /v1/chat/completions: conversations, with reasoning, tool calls and answers of a given form."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from anyio import to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rkf.errors import UsageError
from rkf.runtime.generate import Limits
from rkf.serve.call_forms import Call
from rkf.serve.catalogue import Served
from rkf.serve.driver import Answer, Reply
from rkf.serve.replies import FINISH, EventStream, Serving, Wish, chat_logprob, head, started, usage, whole
from rkf.serve.shapes import ChatMessage, ChatRequest, NamedTool, Tool
from rkf.serve.splitting import Splitter


class Conversation:
    """A chat request on its way: its reply, and how the text of each answer falls into parts."""

    def __init__(self, serving: Serving, served: Served, reply: Reply[Answer], splitters: Sequence[Splitter]) -> None:
        self.serving, self.served, self.reply = serving, served, reply
        self._splitters = splitters
        self._calls = [0] * len(splitters)
        self._reasoning_tokens = 0

    @classmethod
    async def begun(cls, serving: Serving, asked: ChatRequest) -> Conversation:
        """Render the prompt and start the answers."""
        served = await serving.catalogue.get(asked.model)
        forms, template = served.output_forms, served.model.tokenizer.template or ""
        tools, calling = _tools(asked)
        if tools and not forms.reads_calls:
            raise UsageError("tools: this model's chat template has no form of calls that the server reads")
        form = serving.form(asked.response_format, default=not tools)
        messages = [_for(template, message) for message in asked.messages]
        arguments = {**serving.defaults.get("template_args", {}), **asked.template_args}
        ids = await to_thread.run_sync(
            lambda: served.model.chat_ids(messages, tools=_plain(tools), template_args=arguments)
        )
        opening = "" if form is None else forms.before_form
        if calling:
            opening, form = forms.required_call(
                {tool.function.name: tool.function.arguments_schema for tool in calling}
            )
        ids += served.model.tokenizer.encode(opening, bos=False)
        most = serving.defaults.get("max_tokens") if asked.limit is None else asked.limit
        limits = Limits(most, served.model.config.eos_ids, (*serving.defaults.get("stop", ()), *asked.stops))
        wish = Wish(serving.sampling(served, asked), limits, form, asked.wanted_logprobs, forms.special)
        prompt_end = served.model.tokenizer.decode(ids[-16:], special=True)
        splitters = [forms.splitter(prompt_end, tools=bool(tools)) for _ in range(asked.n)]
        return cls(serving, served, await started(serving, served, [ids], asked.n, wish), splitters)

    async def deltas(self) -> AsyncIterator[tuple[int, dict[str, Any], list[dict[str, Any]], str | None] | None]:
        """(answer, what it adds, log-probabilities, why it ended) piece by piece; None: a sign of life."""
        tokenizer = self.served.model.tokenizer
        async for piece in self.reply.pieces():
            if piece is None:
                yield None
                continue
            number = piece.task.number
            splitter = self._splitters[number]
            self._reasoning_tokens += piece.tokens * splitter.reasons
            parts = splitter.push(piece.text)
            if piece.finish:
                rest = splitter.finish()
                parts = parts._replace(
                    content=parts.content + rest.content,
                    reasoning=parts.reasoning + rest.reasoning,
                    calls=parts.calls + rest.calls,
                )
            delta: dict[str, Any] = {}
            if parts.content:
                delta["content"] = parts.content
            if parts.reasoning:
                delta["reasoning_content"] = parts.reasoning
            if parts.calls:
                delta["tool_calls"] = [self._call(number, call) for call in parts.calls]
            finish = FINISH[piece.finish] if piece.finish else None
            if finish == "stop" and self._calls[number]:
                finish = "tool_calls"
            if delta or finish or piece.logprobs:
                yield number, delta, [chat_logprob(tokenizer, told) for told in piece.logprobs], finish

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt and of the answers."""
        return usage(self.reply, 1) | {"completion_tokens_details": {"reasoning_tokens": self._reasoning_tokens}}

    def _call(self, number: int, call: Call) -> dict[str, Any]:
        at, self._calls[number] = self._calls[number], self._calls[number] + 1
        return {
            "index": at,
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }


async def chat_completions(request: HttpRequest) -> Response:
    """The endpoint."""
    serving: Serving = request.app.state.serving
    asked = await serving.read(request, ChatRequest)
    conversation = await Conversation.begun(serving, asked)
    if asked.stream:
        return EventStream(serving, conversation.served, conversation.reply, _chunks(conversation, asked))
    return JSONResponse(await whole(request, conversation.served, conversation.reply, _completion(conversation, asked)))


async def _completion(conversation: Conversation, asked: ChatRequest) -> dict[str, Any]:
    choices: list[dict[str, Any]] = [
        {
            "index": n,
            "message": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": {"content": [], "refusal": None} if asked.logprobs else None,
            "finish_reason": None,
        }
        for n in range(asked.n)
    ]
    async for found in conversation.deltas():
        if found is None:
            continue
        number, delta, logprobs, finish = found
        choice = choices[number]
        message = choice["message"]
        for key in ("content", "reasoning_content"):
            if key in delta:
                message[key] = message.get(key, "") + delta[key]
        for call in delta.get("tool_calls", ()):
            message.setdefault("tool_calls", []).append({key: call[key] for key in ("id", "type", "function")})
        if logprobs:
            choice["logprobs"]["content"] += logprobs
        choice["finish_reason"] = finish or choice["finish_reason"]
    for choice in choices:
        if "tool_calls" in choice["message"] and not choice["message"]["content"].strip():
            choice["message"]["content"] = None
    return {
        **head("chat.completion", "chatcmpl", conversation.served),
        "choices": choices,
        "usage": conversation.usage,
    }


async def _chunks(conversation: Conversation, asked: ChatRequest) -> AsyncIterator[dict[str, Any] | None]:
    first = head("chat.completion.chunk", "chatcmpl", conversation.served)
    counted = asked.stream_options is not None and asked.stream_options.include_usage
    if counted:
        first["usage"] = None

    def chunk(number: int, delta: Mapping[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**first, "choices": [choice]}

    for number in range(asked.n):
        yield chunk(number, {"role": "assistant", "content": ""})
    async for found in conversation.deltas():
        if found is None:
            yield None
            continue
        number, delta, logprobs, finish = found
        told = {"content": logprobs, "refusal": None} if logprobs else None
        if delta or told:
            yield chunk(number, delta, told)
        if finish:
            yield chunk(number, {}, None, finish)
    if counted:
        yield {**first, "choices": [], "usage": conversation.usage}


def _for(template: str, message: ChatMessage) -> dict[str, Any]:
    """A message for a template: a developer is a system where the template does not know one. A template that knows
    `thinking` takes it beside calls only without content.
    """
    found = message.for_template()
    if "thinking" in template and "reasoning_content" in found and found["content"] and "tool_calls" in found:
        found["thinking"] = None
    if found["role"] == "developer" and "developer" not in template:
        found["role"] = "system"
    return found


def _tools(asked: ChatRequest) -> tuple[list[Tool], list[Tool]]:
    """The tools that the template shows, and those of which one must be called."""
    tools, choice = asked.tools or [], asked.tool_choice or "auto"
    if choice == "none" or (not tools and choice == "auto"):
        return [], []
    if choice == "auto":
        return tools, []
    named = [tool for tool in tools if not isinstance(choice, NamedTool) or tool.function.name == choice.function.name]
    if not named:
        raise UsageError("tool_choice: expected a function among tools")
    return tools, named


def _plain(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    return [tool.model_dump(exclude_none=True) for tool in tools] or None
