"""From a request to its reply: prompts and options to running answers, and what all answers report."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from secrets import token_hex
from time import time
from typing import Any, TypeVar

from anyio import to_thread
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rkf.runtime.backend import F32
from rkf.runtime.chooser import Chooser, TokenLogprob, logprob_of
from rkf.runtime.embedding import Pooling
from rkf.runtime.generate import AnswerText, Limits
from rkf.runtime.guide import Form
from rkf.runtime.recommended import sampling_for
from rkf.runtime.sampling import Sampling
from rkf.serve.catalogue import Catalogue, Served
from rkf.serve.driver import Answer, Driver, Reply
from rkf.serve.metrics import Metrics
from rkf.serve.refusals import Refused, invalid, refused
from rkf.serve.shapes import Answering, ResponseFormat, Shape
from rkf.text.tokenizer import Tokenizer

BODY_SECONDS = 30.0  # for a client to send its body
FINISH = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "length"}
S = TypeVar("S", bound=Shape)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Serving:
    """What every endpoint uses. defaults, pooling: keywords of `Model.stream` and `Model.embed` for requests that do
    not give them.
    """

    catalogue: Catalogue
    driver: Driver
    metrics: Metrics
    defaults: dict[str, Any]
    body_bytes: int
    pooling: Pooling

    def submit(self, served: Served, reply: Reply[Any]) -> None:
        """Start a reply; `close` must follow. Refused 429: the queue of its model is full."""
        most = served.options.parallel + served.options.queue
        if served.open_answers + len(reply.tasks) > most:
            raise Refused(429, f"{served.name}: {served.open_answers} of {most} answers are under way: try again later")
        served.open_answers += len(reply.tasks)
        self.driver.submit(reply)

    def close(self, served: Served, reply: Reply[Any]) -> None:
        """End a reply, whether it is complete or not."""
        served.open_answers -= len(reply.tasks)
        self.driver.cancel(reply)

    def sampling(self, served: Served, request: Answering) -> Sampling:
        """A request's sampling, then the server's, then the model's own."""
        names = set(Sampling.__dataclass_fields__)
        defaults = {name: value for name, value in self.defaults.items() if name in names}
        return sampling_for(served.model.config, {**defaults, **request.sampling})

    def form(self, asked: ResponseFormat | None, *, default: bool = True) -> Form | None:
        """The form that a request asks for, else the server's if `default`."""
        if asked is not None:
            return asked.form
        return self.defaults.get("form") if default else None

    async def read(self, request: HttpRequest, shape: type[S]) -> S:
        """A request's body. Refused: too long, too slow, not JSON, or not of the shape."""
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, f"content-type: expected application/json, got {kind[:100]!r}")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > self.body_bytes:
                        raise Refused(413, f"the body is longer than {self.body_bytes} bytes")
        except ClientDisconnect:
            raise Refused(499, "the client has gone") from None
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
        try:
            return await to_thread.run_sync(shape.model_validate_json, bytes(body))
        except ValidationError as error:
            raise invalid(error) from None


@dataclass(frozen=True, slots=True)
class Wish:
    """What all answers of a reply have in common. special: show special tokens in the text; continues: the text goes on
    from the prompt's; echoed: tell the log-probabilities of the prompt too.
    """

    sampling: Sampling
    limits: Limits
    form: Form | None = None
    top_logprobs: int | None = None
    special: bool = False
    continues: bool = False
    echoed: bool = False


async def started(serving: Serving, served: Served, prompts: Sequence[list[int]], n: int, wish: Wish) -> Reply[Answer]:
    """The reply with `n` answers to each prompt, submitted. Each answer has a seed of its own."""
    guide = None
    if wish.form is not None:
        guide = await to_thread.run_sync(served.model.guides.guide, wish.form)
    answers = []
    for number, ids in enumerate(each for each in prompts for _ in range(n)):
        sampling = _with_seed(wish.sampling, number % n)
        chooser = Chooser(sampling, len(ids), guide and guide.copy(), wish.top_logprobs)
        request = wish.limits.request(ids, chooser, served.model.draft)
        served.engine.check(request)
        text = served.model.tokenizer.stream(ids if wish.continues else (), special=wish.special)
        answer = Answer(number, served.engine, request, chooser, AnswerText(text, wish.limits.stop))
        if wish.echoed and wish.top_logprobs is not None:
            request.scores = _scorer(answer, wish.top_logprobs)
        answers.append(answer)
    reply = Reply(answers)
    serving.submit(served, reply)
    return reply


def _scorer(answer: Answer, top: int) -> Callable[[int, F32], None]:
    """Keeps the log-probability of each token of a prompt."""

    def score(position: int, logits: F32) -> None:
        answer.prompt_logprobs.append(logprob_of(answer.request.ids[position + 1], logits, top))

    return score


def _with_seed(sampling: Sampling, number: int) -> Sampling:
    return replace(sampling, seed=(sampling.seed + number) % (1 << 64)) if number else sampling


def head(kind: str, prefix: str, served: Served) -> dict[str, Any]:
    """The fields that every reply begins with."""
    return {"id": f"{prefix}-{token_hex(12)}", "object": kind, "created": int(time()), "model": served.name}


def usage(reply: Reply[Any], prompts: int) -> dict[str, Any]:
    """Tokens of the prompts, each counted once, and of all answers."""
    n = len(reply.tasks) // prompts
    requests = [task.request for task in reply.tasks]
    prompt, answered = sum(each.prompt_tokens for each in requests[::n]), sum(each.tokens for each in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answered,
        "total_tokens": prompt + answered,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in requests[::n])},
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], special=True)


def chat_logprob(tokenizer: Tokenizer, told: TokenLogprob) -> dict[str, Any]:
    """A token's log-probability in the shape of chat completions."""
    tops = [_token_logprob(tokenizer, token, logprob) for token, logprob in told.top]
    return {**_token_logprob(tokenizer, told.token, told.logprob), "top_logprobs": tops}


def _token_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = token_text(tokenizer, token)
    whole = "\ufffd" not in text  # otherwise a part of a character, whose bytes the text does not tell
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode()) if whole else None}


async def whole(request: HttpRequest, served: Served, reply: Reply[Any], answer: Awaitable[T]) -> T:
    """An answer that is sent at once when it is complete; its work ends if the client goes."""
    serving: Serving = request.app.state.serving

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refused(499, "the client has gone")
        return work.result()
    finally:
        watch.cancel()
        work.cancel()
        serving.close(served, reply)


class EventStream(StreamingResponse):
    """Server-sent events of a reply as they come; None is a sign of life, an error is the last one.

    typed: events have types, as those of responses; others end with [DONE].
    """

    def __init__(
        self,
        serving: Serving,
        served: Served,
        reply: Reply[Any],
        events: AsyncIterator[dict[str, Any] | None],
        *,
        typed: bool = False,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_lines(events, typed), media_type="text/event-stream", headers=headers)
        self._close = lambda: serving.close(served, reply)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:  # here and not in the events, which never start if the client has gone already
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _lines(events: AsyncIterator[dict[str, Any] | None], typed: bool) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield ": still computing\n\n" if event is None else sse(event)
        if not typed:
            yield "data: [DONE]\n\n"
    except Exception as error:  # noqa: BLE001 - the status is sent: only an event can tell
        told = refused(error).body
        yield sse({**told["error"], "type": "error"} if typed else told)


def sse(event: dict[str, Any]) -> str:
    """A server-sent event; one with a type is named by it."""
    named = f"event: {event['type']}\n" if "type" in event else ""
    return f"{named}data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
