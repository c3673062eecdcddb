"""Errors of the server in OpenAI's shape: a status, and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from rkf.errors import ContextLengthError, RkfError, UsageError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
log = logging.getLogger("rkf.serve")


class Refused(Exception):
    """The server refuses a request. param: the field at fault; code: OpenAI's name of the cause."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body, self.status, headers)


def refused(error: BaseException) -> Refused:
    """Any error as a refusal. Errors that nobody raised on purpose are logged; their text stays here."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, ContextLengthError):
        return Refused(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, UsageError):
        return Refused(400, str(error))
    if isinstance(error, RkfError):
        return Refused(500, str(error))
    if isinstance(error, HTTPException):
        return Refused(error.status_code, f"{error.detail}: see docs/serve.md for the paths and methods")
    if isinstance(error, MemoryError):
        return Refused(503, "not enough memory: try a shorter prompt, or later")
    log.error("internal error", exc_info=error)
    return Refused(500, "internal error: the server's log has the details")


def invalid(error: ValidationError) -> Refused:
    """The first fault that a shape found in a request."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "list[", "union")))
    message = first["msg"].removeprefix("Value error, ")
    return Refused(400, f"{where}: {message}" if where else message, param=where or None)


async def as_response(_: HttpRequest, error: Exception) -> JSONResponse:
    """The handler of every exception."""
    return refused(error).response
