"""What a route needs besides its body: the service, the conversation's templates and parsers, and the request's id."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from fastapi import Request

from engine.extensions.server.chat import Chat
from engine.extensions.server.errors import APIError
from engine.extensions.server.history import Store
from engine.extensions.server.protocol import Sampling
from engine.extensions.server.service import Call, Service

if TYPE_CHECKING:
    from engine.extensions.server.pooling import PoolingRequest

TRACED = ("traceparent", "tracestate")
"""W3C's headers, which tell of what trace a request is a part."""

ROUTES = {
    "embed": "/v1/embeddings, or /v1/score",
    "classify": "/v1/classify",
    "token_classify": "/pooling",
    "score": "/v1/score, or /v1/rerank",
}
"""Which route serves a task of a model that does not generate."""


def service(request: Request) -> Service:
    """Of the app."""
    return cast(Service, request.app.state.service)


def chat(request: Request) -> Chat:
    """Of the app."""
    return cast(Chat, request.app.state.chat)


def store(request: Request) -> Store:
    """Of the app."""
    return cast(Store, request.app.state.store)


def request_id(request: Request) -> str:
    """The client's X-Request-Id, or one of ours."""
    return str(request.state.request_id)


def call(request: Request, body: Sampling | PoolingRequest, prefix: str) -> Call:
    """What all prompts of a request share; checks what does not depend on the prompt."""
    here = service(request)
    body.check(here.args.allow_unknown_fields)
    here.check_model(body.model)
    if isinstance(body, Sampling) and (served := here.llm.info.pooling):
        what = f"the model does not generate; it serves {', '.join(served['tasks'])}"
        raise APIError(400, f"{what}: ask {ROUTES[served['tasks'][0]]}", "model", "model_does_not_generate")
    if body.priority and here.llm.args.scheduling_policy != "priority":
        raise APIError(400, "priority needs a server that runs with --scheduling-policy priority", "priority")
    traced = {name: value for name in TRACED if (value := request.headers.get(name)) is not None}
    return Call(f"{prefix}-{request_id(request)}", body.timeout, body.priority, body.cache_salt, traced)
