"""POST /v1/completions: continues texts as they are, and tells the log-probabilities of prompts (`echo`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from anyio import to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rkf.errors import UsageError
from rkf.runtime.chooser import TokenLogprob
from rkf.runtime.generate import Limits
from rkf.serve.catalogue import Served
from rkf.serve.driver import Answer, Reply
from rkf.serve.replies import FINISH, EventStream, Serving, Wish, head, started, token_text, usage, whole
from rkf.serve.shapes import CompletionRequest
from rkf.text.tokenizer import Tokenizer


async def completions(request: HttpRequest) -> Response:
    """The endpoint."""
    serving: Serving = request.app.state.serving
    asked = await serving.read(request, CompletionRequest)
    if asked.stream and asked.echo and asked.logprobs is not None:
        raise UsageError(
            "stream: the log-probabilities of an echoed prompt come in one piece only: stream without them"
        )
    served = await serving.catalogue.get(asked.model)
    prompts = await to_thread.run_sync(lambda: [served.model.text_ids(prompt) for prompt in asked.prompts])
    form = serving.form(asked.response_format)
    limits = Limits(asked.max_tokens, served.model.config.eos_ids, (*serving.defaults.get("stop", ()), *asked.stops))
    wish = Wish(serving.sampling(served, asked), limits, form, asked.logprobs, continues=True, echoed=bool(asked.echo))
    reply = await started(serving, served, prompts, asked.n, wish)
    if asked.stream:
        return EventStream(serving, served, reply, _chunks(served, reply, asked))
    return JSONResponse(await whole(request, served, reply, _completion(served, reply, asked)))


async def _completion(served: Served, reply: Reply[Answer], asked: CompletionRequest) -> dict[str, Any]:
    texts, finish = [""] * len(reply.tasks), [""] * len(reply.tasks)
    async for piece in reply.pieces():
        if piece is not None:
            texts[piece.task.number] += piece.text
            finish[piece.task.number] = piece.finish
    choices = [
        _choice(served.model.tokenizer, answer, asked, texts[n], finish[n]) for n, answer in enumerate(reply.tasks)
    ]
    return {
        **head("text_completion", "cmpl", served),
        "choices": choices,
        "usage": usage(reply, len(reply.tasks) // asked.n),
    }


def _choice(tokenizer: Tokenizer, answer: Answer, asked: CompletionRequest, text: str, finish: str) -> dict[str, Any]:
    request = answer.request
    prompt = tokenizer.decode(request.ids[: request.prompt_tokens], special=True) if asked.echo else ""
    told: list[TokenLogprob | None] = list(answer.chooser.logprobs)
    if asked.echo and asked.logprobs is not None:
        told = [None, *answer.prompt_logprobs, *told]
    first = request.ids[0] if told and told[0] is None else None
    return {
        "index": answer.number,
        "text": prompt + text,
        "logprobs": None if asked.logprobs is None else _logprobs(tokenizer, told, first),
        "finish_reason": FINISH[finish],
    }


def _logprobs(
    tokenizer: Tokenizer, told: list[TokenLogprob | None], first: int | None, offset: int = 0
) -> dict[str, Any]:
    """Log-probabilities in the shape of completions. first: the token of the entry None, which has no probability."""
    tokens, offsets = [], []
    for each in told:
        tokens.append(token_text(tokenizer, each.token if each is not None else first or 0))
        offsets.append(offset)
        offset += len(tokens[-1])
    return {
        "tokens": tokens,
        "token_logprobs": [each and each.logprob for each in told],
        "top_logprobs": [each and _top(tokenizer, each) for each in told],
        "text_offset": offsets,
    }


def _top(tokenizer: Tokenizer, told: TokenLogprob) -> dict[str, float]:
    """The most likely tokens by their text; parts of characters by their ids, because their texts are the same."""
    found: dict[str, float] = {}
    for token, logprob in told.top:
        text = token_text(tokenizer, token)
        found.setdefault(f"token:{token}" if "\ufffd" in text or text in found else text, logprob)
    return found


async def _chunks(
    served: Served, reply: Reply[Answer], asked: CompletionRequest
) -> AsyncIterator[dict[str, Any] | None]:
    first, tokenizer = head("text_completion", "cmpl", served), served.model.tokenizer
    offsets = [0] * len(reply.tasks)
    if asked.echo:
        for answer in reply.tasks:
            prompt = tokenizer.decode(answer.request.ids[: answer.request.prompt_tokens], special=True)
            choice = {"index": answer.number, "text": prompt, "logprobs": None, "finish_reason": None}
            yield {**first, "choices": [choice]}
    async for piece in reply.pieces():
        if piece is None:
            yield None
            continue
        number, finish, logprobs = piece.task.number, FINISH.get(piece.finish), None
        if piece.logprobs:
            logprobs = _logprobs(tokenizer, list(piece.logprobs), None, offsets[number])
        offsets[number] += len(piece.text)
        if piece.text or finish or logprobs:
            choice = {"index": number, "text": piece.text, "logprobs": logprobs, "finish_reason": finish}
            yield {**first, "choices": [choice]}
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield {**first, "choices": [], "usage": usage(reply, len(reply.tasks) // asked.n)}
