"""POST /v1/embeddings: texts as vectors."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from anyio import to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rkf.errors import ContextLengthError, UsageError
from rkf.runtime.embedding import Embedding
from rkf.serve.catalogue import Served
from rkf.serve.driver import Reply, Task
from rkf.serve.refusals import Refused
from rkf.serve.replies import Serving, whole
from rkf.serve.shapes import EmbeddingsRequest


async def embeddings(request: HttpRequest) -> Response:
    """The endpoint."""
    serving: Serving = request.app.state.serving
    asked = await serving.read(request, EmbeddingsRequest)
    served = await serving.catalogue.get(asked.model)
    width = served.model.embedding_width
    if asked.dimensions is not None and asked.dimensions > width:
        raise Refused(400, f"dimensions: expected 1 to {width} for this model", param="dimensions")
    found = await to_thread.run_sync(_checked, serving, served, asked)
    # Many texts run in groups of about one length, so that others' requests come between them. The longest first: its
    # group takes the most memory, and if there is too little, the request should fail soon.
    ordered, size = sorted(found, key=lambda each: -each.request.prompt_tokens), served.options.parallel
    for start in range(0, len(ordered), size):
        group = ordered[start : start + size]
        reply = Reply([Task(n, served.engine, each.request) for n, each in enumerate(group)])
        serving.submit(served, reply)
        await whole(request, served, reply, _read(reply))
    return await to_thread.run_sync(lambda: JSONResponse(_answer(served, asked, found)))


def _checked(serving: Serving, served: Served, asked: EmbeddingsRequest) -> list[Embedding]:
    """An embedding for each text. Refused: one that is empty, too long, or has unknown ids."""
    found = []
    for number, text in enumerate(asked.texts):
        try:
            found.append(Embedding(served.model.embedded_ids(text), asked.pooling or serving.pooling))
            served.engine.check(found[-1].request)
        except (UsageError, ContextLengthError) as error:
            code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
            raise Refused(400, f"input.{number}: {error}", param="input", code=code) from None
    return found


async def _read(reply: Reply[Task]) -> None:
    async for _ in reply.pieces():
        pass


def _answer(served: Served, asked: EmbeddingsRequest, found: Sequence[Embedding]) -> dict[str, Any]:
    tokens = sum(each.request.prompt_tokens for each in found)
    data = []
    for number, each in enumerate(found):
        vector = each.vector(asked.dimensions)
        told = b64encode(vector.astype("<f4").tobytes()).decode() if asked.encoding_format == "base64" else None
        data.append({"object": "embedding", "index": number, "embedding": told or vector.tolist()})
    return {
        "object": "list",
        "data": data,
        "model": served.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
