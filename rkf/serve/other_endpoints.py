"""The endpoints beside answers: models, tokens, health, metrics and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anyio import to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response

from rkf.errors import UsageError
from rkf.serve.replies import Serving
from rkf.serve.shapes import DetokenizeRequest, TokenizeRequest

WEB = Path(__file__).with_name("web")
_PAGE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src"
    " 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


async def models(request: HttpRequest) -> Response:
    """GET /v1/models"""
    serving: Serving = request.app.state.serving
    return JSONResponse({"object": "list", "data": [_model(serving, name) for name in serving.catalogue.paths]})


async def model(request: HttpRequest) -> Response:
    """GET /v1/models/{name}: with its limits once it is loaded."""
    serving: Serving = request.app.state.serving
    name = request.path_params["name"]
    serving.catalogue.check(name)
    served = serving.catalogue.ready.get(name)
    limits = {} if served is None else {"context_length": served.engine.context}
    return JSONResponse(_model(serving, name) | limits)


def _model(serving: Serving, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": serving.catalogue.created, "owned_by": "rkf"}


async def tokenize(request: HttpRequest) -> Response:
    """POST /tokenize: text to ids; with_pieces: each with its text."""
    serving: Serving = request.app.state.serving
    asked = await serving.read(request, TokenizeRequest)
    tokenizer = (await serving.catalogue.get(asked.model)).model.tokenizer
    ids = await to_thread.run_sync(lambda: tokenizer.encode(asked.content, bos=asked.add_special))
    if not asked.with_pieces:
        return JSONResponse({"tokens": ids})
    return JSONResponse({"tokens": [{"id": i, "piece": tokenizer.decode([i], special=True)} for i in ids]})


async def detokenize(request: HttpRequest) -> Response:
    """POST /detokenize: ids to text, special tokens included, under both names that clients expect."""
    serving: Serving = request.app.state.serving
    asked = await serving.read(request, DetokenizeRequest)
    model = (await serving.catalogue.get(asked.model)).model
    if any(token >= model.config.vocab_size for token in asked.tokens):
        raise UsageError(f"tokens: expected ids below {model.config.vocab_size}")
    text = await to_thread.run_sync(lambda: model.tokenizer.decode(asked.tokens, special=True))
    return JSONResponse({"content": text, "prompt": text})


async def tokenizer_info(request: HttpRequest) -> Response:
    """GET /tokenizer_info?model=NAME: what lm-evaluation-harness needs to use this server's tokenizer."""
    serving: Serving = request.app.state.serving
    ready = (await serving.catalogue.get(request.query_params.get("model"))).model
    ids = {"bos_token": ready.config.bos_id, "eos_token": next(iter(ready.config.eos_ids), None)}
    texts = {name: None if i is None else ready.tokenizer.decode([i], special=True) for name, i in ids.items()}
    return JSONResponse({**texts, "chat_template": ready.tokenizer.template})


async def health(request: HttpRequest) -> Response:
    """GET /health"""
    return JSONResponse({"status": "ok"})


async def metrics(request: HttpRequest) -> Response:
    """GET /metrics"""
    serving: Serving = request.app.state.serving
    return Response(serving.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def page(request: HttpRequest) -> Response:
    """GET /: the web chat."""
    return FileResponse(WEB / "index.html", headers=_PAGE)
