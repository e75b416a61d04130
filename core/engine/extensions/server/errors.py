"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``, naming the field that is wrong.

| status | type                  | when                                                                      |
|--------|-----------------------|---------------------------------------------------------------------------|
| 400    | invalid_request_error | a field is wrong, unknown, or asks for what this server does not have     |
| 401    | authentication_error  | no API key, or a wrong one                                                |
| 404    | not_found_error       | no such route, model or response                                          |
| 405    | invalid_request_error | the route has another method                                              |
| 408    | timeout_error         | the request's deadline passed                                             |
| 413    | invalid_request_error | the body is too large                                                     |
| 415    | invalid_request_error | the body is not JSON                                                      |
| 429    | overloaded_error      | too many requests wait; Retry-After says when to come again               |
| 500    | internal_error        | a fault of the server; the log has the request's id                       |
| 503    | unavailable_error     | the model loads, the server drains, or the engine's process ended         |
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from engine.errors import EngineError, RequestError
from engine.extensions.server.answers import Error, ErrorBody
from engine.request import SamplingParams

log = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "overloaded_error",
    500: "internal_error",
    503: "unavailable_error",
}
_SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)}
_POOLING = {"dimensions", "normalize", "use_activation", "truncate_prompt_tokens", "task", "prompt_name", "instruction"}
_PROMPTS = {
    "/v1/completions": "prompt",
    "/v1/chat/completions": "messages",
    **dict.fromkeys(("/v1/responses", "/v1/embeddings", "/pooling", "/v1/classify", "/classify"), "input"),
    **dict.fromkeys(("/v1/score", "/score"), "text_2"),
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v2/rerank"), "documents"),
}
_LONGEST = 1000  # characters of a message; some quote what was sent


class APIError(HTTPException):
    """What a client is told.

    Args:
        status: of HTTP.
        message: cause and remedy.
        param: the field that is wrong, with dots and indices: ``messages.0.content``.
        code: a word for programs.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> ErrorBody:
        """The object that clients get."""
        message = self.message if len(self.message) <= _LONGEST else self.message[:_LONGEST] + "..."
        kind = _TYPES.get(self.status_code, "invalid_request_error")
        return ErrorBody(Error(_sendable(message), kind, self.param and _sendable(self.param), self.code))

    def response(self) -> Response:
        """As the answer to a request."""
        return Response(msgspec.json.encode(self.body()), self.status_code, self.headers, media_type="application/json")


def _sendable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent


def unavailable(message: str, retry_after: int = 1) -> APIError:
    """503: come again."""
    return APIError(503, message, code="unavailable", headers={"Retry-After": str(retry_after)})


def as_api_error(error: BaseException, path: str = "") -> APIError:
    """Any exception as what a client is told of it; faults of ours are logged.

    Args:
        error: what was raised.
        path: the route, which knows how its prompt is called.
    """
    match error:
        case APIError():
            return error
        case RequestError():
            word = re.match(r"\w*", str(error))
            param = word[0] if word and word[0] in _SAMPLING | _POOLING else None
            code = None
            if str(error).startswith(("the prompt", "token id", "the conversation", "the chat template")):
                param = _PROMPTS.get(path)
            if str(error).startswith("the prompt has"):
                code = "context_length_exceeded"
            return APIError(400, str(error), param, code)
        case EngineError():
            return unavailable(str(error), retry_after=10)
        case RequestValidationError():
            return _invalid([{**e, "loc": e["loc"][1:]} for e in error.errors()])
        case ValidationError():
            return _invalid(error.errors())
        case HTTPException(status_code=404):
            return APIError(404, f"there is no route {path!r}; /openapi.json lists all", code="route_not_found")
        case HTTPException():
            return APIError(error.status_code, str(error.detail), headers=error.headers)
    log.error("a request failed", exc_info=error)
    return APIError(500, "the server failed on this request; its log tells more under the request's id")


def _invalid(mistakes: Sequence[Any]) -> APIError:
    """The first mistake; of a union, the deepest one, which is the member that the client meant."""
    first = max(mistakes, key=lambda e: len(e["loc"]))
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {first['ctx']['error']}", code="json_invalid")
    # Names of union members and of validators are in the path too; field names are lower case.
    steps = [str(step) for step in first["loc"] if isinstance(step, int) or re.fullmatch(r"[a-z][a-z0-9_]*", step)]
    words = {"str", "int", "list", "dict", "bool", "float", "constrained"}
    param = ".".join(s for s in steps if s not in words) or None
    return APIError(400, f"{param or 'the body'}: {first['msg']}", param, first["type"])


def install(app: FastAPI) -> None:
    """Answer every exception in OpenAI's shape."""

    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error, request.url.path).response()

    for kind in (HTTPException, RequestValidationError, ValidationError, EngineError, Exception):
        app.add_exception_handler(kind, answer)
