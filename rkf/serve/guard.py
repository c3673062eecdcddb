"""What stands before every endpoint: the key, the browser's origin, and the count of responses."""

from __future__ import annotations

import hmac
from collections.abc import Collection, Sequence
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rkf.serve.metrics import Metrics
from rkf.serve.refusals import Refused

_OPEN = ("/", "/health")  # and the page's files: these need no key
_LOCAL = {"localhost", "127.0.0.1", "::1"}


class Guard:
    """Lets requests through that have a key, if there are any, and that no foreign page makes.

    hosts: names under which the server answers (None: any); a browser that a foreign page has tricked names another.
    origins: of pages elsewhere that may use the server.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        paths: Collection[str],
        keys: Sequence[str] = (),
        hosts: Collection[str] | None = None,
        origins: Collection[str] = (),
    ) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths
        self._keys = [key.encode() for key in keys]
        self._hosts, self._origins = hosts, set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.responses.labels(path, message["status"]).inc()
            await send(message)

        fault = self._fault(scope)
        if fault is None:
            await self._app(scope, receive, counted)
        else:
            await fault.response(scope, receive, counted)

    def _fault(self, scope: Scope) -> Refused | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts is not None and _split("//" + host).hostname not in self._hosts:
            return Refused(403, f"host {host[:100]!r}: this server answers as {', '.join(sorted(self._hosts))}")
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and _split(origin).netloc != (host or None):
            return Refused(
                403, f"origin {origin[:100]!r}: start the server with --allow-origin to let this page use it"
            )
        path = scope["path"]
        if self._keys and path not in _OPEN and not path.startswith("/web/") and not self._has_key(headers):
            return Refused(401, "expected an API key in the header Authorization: Bearer KEY", code="invalid_api_key")
        return None

    def _has_key(self, headers: Headers) -> bool:
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if kind.lower() == "bearer" else b""
        return sum(hmac.compare_digest(given, known) for known in self._keys) > 0  # never fewer comparisons


def _split(address: str) -> SplitResult:
    """The parts of an address in a header; one that is none, such as `[::1`, has no name."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def local_hosts(host: str) -> Collection[str] | None:
    """The names of a server that listens at `host`: those of this machine alone if it is a loopback address."""
    return _LOCAL if host in _LOCAL or host.startswith("127.") else None
