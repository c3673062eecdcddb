"""The application: its paths, its guard, and its life from start to drain."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from rkf.errors import RkfError
from rkf.runtime.embedding import Pooling
from rkf.serve import other_endpoints as other
from rkf.serve.catalogue import Catalogue, EngineOptions
from rkf.serve.chat_endpoint import chat_completions
from rkf.serve.completions_endpoint import completions
from rkf.serve.driver import Driver
from rkf.serve.embeddings_endpoint import embeddings
from rkf.serve.guard import Guard, local_hosts
from rkf.serve.metrics import Metrics
from rkf.serve.refusals import Refused, as_response, log
from rkf.serve.replies import Serving
from rkf.serve.responses_endpoint import responses

BODY_BYTES = 8 << 20  # of a request: two million tokens of English
UNREAD_SECONDS = 60  # until a connection is closed whose client reads nothing


def application(
    catalogue: Catalogue,
    *,
    defaults: Mapping[str, Any] | None = None,
    keys: Sequence[str] = (),
    hosts: Collection[str] | None = None,
    origins: Sequence[str] = (),
    body_bytes: int = BODY_BYTES,
    pooling: Pooling = "mean",
) -> Starlette:
    """The ASGI application over a catalogue of models; `rkf serve` explains the options."""
    metrics = Metrics()
    driver = Driver(metrics)
    routes: list[BaseRoute] = [
        Route("/v1/models", other.models),
        Route("/v1/models/{name}", other.model),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/tokenize", other.tokenize, methods=["POST"]),
        Route("/detokenize", other.detokenize, methods=["POST"]),
        Route("/tokenizer_info", other.tokenizer_info),
        Route("/health", other.health),
        Route("/metrics", other.metrics),
        Route("/", other.page),
    ]
    paths = {route.path for route in routes if isinstance(route, Route)}
    routes.append(Mount("/web", StaticFiles(directory=other.WEB)))

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        driver.start()
        yield
        driver.stop()
        catalogue.close()

    app = Starlette(
        routes=routes,
        lifespan=life,
        middleware=[
            Middleware(Guard, metrics=metrics, paths=paths, keys=keys, hosts=hosts, origins=origins),
            Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]),
        ],
        exception_handlers=dict.fromkeys((Refused, RkfError, HTTPException, MemoryError, Exception), as_response),
    )
    app.state.serving = Serving(catalogue, driver, metrics, dict(defaults or {}), body_bytes, pooling)
    metrics.watch("rkf_running_requests", "Requests that have a sequence.", lambda: _sum(catalogue, "running"))
    metrics.watch("rkf_waiting_requests", "Requests that wait for one.", lambda: _sum(catalogue, "waiting"))
    metrics.watch(
        "rkf_cache_bytes",
        "Memory of keys, values and states.",
        lambda: sum(served.model.backend.held_bytes for served in catalogue.ready.values()),
    )
    return app


def _sum(catalogue: Catalogue, name: str) -> float:
    return float(sum(getattr(served.engine, name) for served in catalogue.ready.values()))


def listening(host: str, port: int) -> socket.socket:
    """A socket at an address, whose connections end if their clients stop reading. RkfError: it cannot be used."""
    try:
        found = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise RkfError(f"{host} port {port}: {error.strerror}: choose another --host or --port") from None
    # Connections inherit both. asyncio sets the first only on sockets whose protocol was named at their creation.
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
    return found


def server(app: Starlette, drain_seconds: int) -> uvicorn.Server:
    """A server for an application. On SIGTERM it finishes the running requests for at most `drain_seconds`."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=drain_seconds,
        limit_concurrency=2048,
        h11_max_incomplete_event_size=64 << 10,
    )
    return uvicorn.Server(config)


def serve(
    paths: Mapping[str, Path],
    *,
    host: str,
    port: int,
    load_options: Mapping[str, Any],
    engine_options: EngineOptions,
    drain_seconds: int,
    **options: Any,
) -> None:
    """Serve until SIGTERM or Ctrl-C. options: keywords of `application`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with listening(host, port) as listener:
        if local_hosts(host) is None and not options.get("keys"):
            log.warning("anyone who reaches %s can use this server: give --api-key-file", host)
        log.info("serving %s at http://%s:%d", ", ".join(paths), host, listener.getsockname()[1])
        catalogue = Catalogue(paths, load_options, engine_options)
        catalogue.load(next(iter(paths)))  # the first request should not wait for it
        running = server(application(catalogue, hosts=local_hosts(host), **options), drain_seconds)
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it is done
            running.run(sockets=[listener])
    if not running.started:
        raise RkfError("the server did not start: see the lines above")
