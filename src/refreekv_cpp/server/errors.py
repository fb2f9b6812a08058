"""Errors as OpenAI's API gives them: a status, and a body that says what is wrong, with which parameter."""

from __future__ import annotations

import logging
import re
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from refreekv_cpp.errors import CacheMemoryError, RefreeKVError
from refreekv_cpp.server.settings import explain

_logger = logging.getLogger(__name__)
# llama-cpp-python's: of a prompt, and of one with images
_TOO_LONG = re.compile(r"Requested tokens \((\d+)\) exceed context window of (\d+)|Prompt exceeds n_ctx: (\d+) > (\d+)")


class RequestError(RefreeKVError):
    """A request that cannot be answered as it is.

    It is no ValueError, which pydantic would take for one of its own.

    Attributes:
        param: the parameter of the request that is to blame, where it is known.
        code: OpenAI's name of the error, for programs.
        status: of HTTP.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def request_error(error: Exception) -> RequestError:
    """An error that a request caused in llama-cpp-python, as a RequestError."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, CacheMemoryError):
        return RequestError(str(error), code="kv_cache_memory_exceeded")
    if match := _TOO_LONG.search(str(error)):
        n_tokens, n_ctx = filter(None, match.groups())
        return RequestError(
            f"This model's maximum context length is {n_ctx} tokens; the prompt has {n_tokens}.",
            code="context_length_exceeded",
        )
    return RequestError(str(error) or type(error).__name__)


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body of the response to an error. One that is not the client's is logged."""
    if isinstance(error, RequestValidationError):
        return 400, _body(_explain_body(error), param=_param(error))
    if isinstance(error, HTTPException):
        return error.status_code, _body(str(error.detail))
    if isinstance(error, (RequestError, CacheMemoryError)):
        error = request_error(error)
        return error.status, _body(str(error), error.param, error.code)
    _logger.error("a request failed", exc_info=error)
    return 500, _body(str(error) or type(error).__name__, kind="internal_server_error")


def error_response(error: Exception) -> JSONResponse:
    status, body = describe(error)
    return JSONResponse(body, status, headers=error.headers if isinstance(error, HTTPException) else None)


def _body(
    message: str, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error"
) -> dict[str, Any]:
    message = message.encode(errors="replace").decode()  # a lone surrogate cannot be sent
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _explain_body(error: RequestValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"The body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
    if tuple(first["loc"]) == ("body",):
        return "The body must be a JSON object, sent with the header Content-Type: application/json"
    return explain(error.errors())


def _param(error: RequestValidationError) -> str | None:
    first = error.errors()[0]
    names = [part for part in first["loc"] if part != "body"]
    return names[0] if names and isinstance(names[0], str) else None
