"""Answers in JSON: models as they are, and every error as `{"error": {"code", "message"}}` with its status.

A fault of ours is answered by its kind alone; its traceback goes to the log.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.errors import InputError, SeedpodError, UnavailableError, UsageError
from app.serve.schemas import ErrorAnswer, ErrorDetail

# The HTTP statuses of codes that have one of their own.
STATUSES: Final[Mapping[str, int]] = {
    "request_not_json": 400,
    "unauthorized": 401,
    "job_unknown": 404,
    "endpoint_unknown": 404,
    "request_too_large": 413,
    "request_not_json_type": 415,
    "host_refused": 421,
    "queue_full": 429,
}
FRAMEWORK: Final[Mapping[int, str]] = {404: "not_found", 405: "method_not_allowed"}


def answered(model: BaseModel) -> Response:
    """The answer that `model` is; what is None at its top is left out."""
    given = model.model_dump()
    return _json({name: value for name, value in given.items() if value is not None}, 200)


def refused(error: SeedpodError) -> Response:
    """The answer to an error."""
    status = status_of(error)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return _error(status, error.code, error.message, headers)


def status_of(error: SeedpodError) -> int:
    """The HTTP status of an error."""
    if error.code in STATUSES:
        return STATUSES[error.code]
    if isinstance(error, UsageError | InputError):
        return 422
    return 503 if isinstance(error, UnavailableError) else 500


def install_handlers(app: FastAPI) -> None:
    """Let every error of the app be answered in our form."""
    app.add_exception_handler(SeedpodError, _of_ours)
    app.add_exception_handler(HTTPException, _of_framework)
    app.add_exception_handler(RequestValidationError, _of_parameter)
    app.add_exception_handler(ClientDisconnect, _of_nobody)
    app.add_exception_handler(Exception, _of_fault)


async def _of_ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, SeedpodError)
    return refused(error)


async def _of_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = FRAMEWORK.get(error.status_code, "http_error")
    message = f"{request.method} {request.url.path[:200]}: {error.detail}; /docs lists the calls."
    return _error(error.status_code, code, message, error.headers)


async def _of_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    told = [f"{each['loc'][-1]} is {str(each['input'])[:80]!r}: {each['msg'].lower()}." for each in problems]
    return _error(422, "request_invalid", " ".join(told))


async def _of_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # the client has gone: nobody reads this


async def _of_fault(request: Request, error: Exception) -> Response:
    kind = type(error).__name__
    message = f"A fault of ours ({kind}); expected an answer. The server's log tells more: please report it."
    return _error(500, "internal_error", message)


def _error(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return _json(ErrorAnswer(error=ErrorDetail(code=code, message=message)).model_dump(), status, headers)


def _json(values: Any, status: int, headers: Mapping[str, str] | None = None) -> Response:
    # In ASCII, with escapes: half of a surrogate pair in what a caller sent cannot be written as UTF-8.
    return Response(json.dumps(values), status, headers, media_type="application/json")
