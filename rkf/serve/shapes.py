"""The requests that the server reads, field by field. Fields that it does not know are ignored, as OpenAI's server does
not know other servers' either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from rkf.errors import UsageError
from rkf.runtime.embedding import Pooling
from rkf.runtime.guide import Form

MOST_CHOICES = 128  # answers of one request
MOST_TEXTS = 2048  # of one request for embeddings, as OpenAI takes
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1 << 20)]
_Texts = str | list[str] | _Ids | list[_Ids]


class Shape(BaseModel):
    """A JSON object of a request."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, strict=True)


class StreamOptions(Shape):
    include_usage: bool = False


class ResponseFormat(Shape):
    """OpenAI's forms of an answer; "regex" and "grammar" (Lark) beside them."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None

    @property
    def form(self) -> Form | None:
        """The form for the engine; None: any text. UsageError: the form's own text is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Form("json_schema", '{"type":"object"}')
        if self.type == "json_schema":
            text = None if self.json_schema is None else self.json_schema.get("schema")
            return Form("json_schema", json.dumps(_present(text, "response_format.json_schema.schema")))
        text = self.regex if self.type == "regex" else self.grammar
        return Form(self.type, _present(text, f"response_format.{self.type}"))


def _present(value: Any, name: str) -> Any:
    if value is None:
        raise UsageError(f"{name}: expected with this type, got nothing")
    return value


class Answering(Shape):
    """How to answer; the words of every endpoint that generates."""

    model: str
    temperature: float | None = Field(None, ge=0)
    top_k: int | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, max_length=1024)
    seed: int | None = None
    stop: _Stop | list[_Stop] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)

    @field_validator("n", "stream", mode="before")
    @classmethod
    def _absent(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("stop")
    @classmethod
    def _few(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > 16:
            raise ValueError(f"expected at most 16 texts, got {len(value)}")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def sampling(self) -> dict[str, Any]:
        """The given options, as fields of rkf.runtime.sampling.Sampling."""
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        found: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_k is not None:
            found["top_k"] = self.top_k if self.top_k > 0 else None  # 0 and -1 turn it off elsewhere
        if self.logit_bias:
            found["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        if self.seed is not None:
            found["seed"] = self.seed % (1 << 64)
        return found


def _token_id(key: str) -> int:
    if not key.isascii() or not key.isdecimal() or len(key) > 9:
        raise UsageError(f"logit_bias: expected token ids as keys, got {key[:20]!r}")
    return int(key)


class CalledFunction(Shape):
    name: str
    arguments: str | dict[str, Any] = "{}"

    @property
    def read_arguments(self) -> Any:
        """The arguments as a map, as templates expect them; text that is no JSON as it is."""
        if isinstance(self.arguments, dict):
            return self.arguments
        try:
            return json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            return self.arguments


class MadeCall(Shape):
    """A call of a function that an earlier answer made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        own = {} if self.id is None else {"id": self.id}
        function = {"name": self.function.name, "arguments": self.function.read_arguments}
        return {**own, "type": self.type, "function": function}


class ChatMessage(Shape):
    """A message of a conversation. Its text stays text, whatever it spells."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[MadeCall] | None = Field(None, max_length=128)
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @field_validator("content")
    @classmethod
    def _text(cls, value: str | list[dict[str, Any]] | None) -> str | None:
        return value if value is None or isinstance(value, str) else "".join(map(_text_of, value))

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it."""
        found = self.model_dump(exclude_none=True, exclude={"tool_calls"})
        if "content" not in found:
            found["content"] = ""
        if self.tool_calls:
            found["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return found


def _text_of(part: Mapping[str, Any]) -> str:
    kind, text = part.get("type"), part.get("text")
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise ValueError(f"expected parts of text, got {str(kind)[:40]!r}: this server reads no images, audio or files")
    return text


class ToolFunction(Shape):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def arguments_schema(self) -> dict[str, Any]:
        """The schema of its arguments."""
        return self.parameters or {"type": "object"}


class Tool(Shape):
    type: Literal["function"]
    function: ToolFunction


class NamedFunction(Shape):
    name: str


class NamedTool(Shape):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Answering):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=64)

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_args(self) -> dict[str, Any]:
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})


class TextFormat(Shape):
    """The form of an answer in a responses request."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    regex: str | None = None
    grammar: str | None = None


class TextOptions(Shape):
    format: TextFormat | None = None


class Reasoning(Shape):
    effort: str | None = None


class FunctionTool(ToolFunction):
    type: Literal["function"]


class FunctionChoice(Shape):
    type: Literal["function"]
    name: str


class ResponsesRequest(Shape):
    """POST /v1/responses"""

    model: str
    input: str | list[dict[str, Any]] = Field(min_length=1, max_length=4096)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    previous_response_id: str | None = None
    background: bool | None = None
    stream: bool | None = None

    @model_validator(mode="after")
    def _stateless(self) -> ResponsesRequest:
        if self.previous_response_id is not None or self.background:
            raise ValueError("previous_response_id, background: this server keeps no responses: send the whole input")
        return self

    @property
    def as_chat(self) -> ChatRequest:
        """The same request for chat completions. ValidationError: an item of the input is not one of those known."""
        form = self.text.format if self.text else None
        wanted: dict[str, Any] = {
            "model": self.model,
            "messages": _messages(self.instructions, self.input),
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": self.top_logprobs is not None,
            "top_logprobs": self.top_logprobs,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
        }
        if form is not None:
            schema = None if form.schema_ is None else {"schema": form.schema_}
            wanted["response_format"] = {**form.model_dump(include={"type", "regex", "grammar"}), "json_schema": schema}
        if self.tools:
            wanted["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools
            ]
        if isinstance(self.tool_choice, FunctionChoice):
            wanted["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        else:
            wanted["tool_choice"] = self.tool_choice
        return ChatRequest.model_validate(wanted)


def _messages(instructions: str | None, given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The input of a response as messages. Calls in a row are one message; thoughts are left out."""
    found: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*found, {"role": "user", "content": given}]
    for item in given:
        kind = item.get("type", "message")
        if kind == "message":
            found.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            if not found or "tool_calls" not in found[-1]:
                found.append({"role": "assistant", "tool_calls": []})
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            found[-1]["tool_calls"].append({"id": item.get("call_id"), "type": "function", "function": function})
        elif kind == "function_call_output":
            found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind != "reasoning":
            raise UsageError(f"input: expected messages and calls of functions, got {str(kind)[:40]!r}")
    return found


class CompletionRequest(Answering):
    """POST /v1/completions"""

    prompt: _Texts
    max_tokens: int | None = Field(16, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt as text or as ids. UsageError: none, or too many."""
        found = _each(self.prompt)
        if not found or len(found) * self.n > MOST_CHOICES:
            raise UsageError(f"prompt: expected 1 to {MOST_CHOICES} prompts times n, got {len(found)} times {self.n}")
        return found


def _each(given: _Texts) -> list[str | list[int]]:
    single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    found: list[Any] = [given] if single else list(given)
    return found


class EmbeddingsRequest(Shape):
    """POST /v1/embeddings"""

    model: str
    input: _Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    pooling: Pooling | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        """Each input as text or as ids. UsageError: none, or too many."""
        found = _each(self.input)
        if not 0 < len(found) <= MOST_TEXTS:
            raise UsageError(f"input: expected 1 to {MOST_TEXTS} texts, got {len(found)}")
        return found


class TokenizeRequest(Shape):
    """POST /tokenize. Other servers call the text `prompt`, and add_special `add_special_tokens`; both are read."""

    model: str | None = None
    content: str = Field(validation_alias=AliasChoices("content", "prompt"))
    add_special: bool = Field(False, validation_alias=AliasChoices("add_special", "add_special_tokens"))
    with_pieces: bool = False


class DetokenizeRequest(Shape):
    """POST /detokenize"""

    model: str | None = None
    tokens: _Ids
