"""What a route needs besides its body: the service, the conversation's templates and parsers, and the request's id."""

from __future__ import annotations

from typing import cast

from fastapi import Request

from engine.extensions.server.chat import Chat
from engine.extensions.server.errors import APIError
from engine.extensions.server.history import Store
from engine.extensions.server.protocol import Sampling
from engine.extensions.server.service import Call, Service


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


def call(request: Request, body: Sampling, prefix: str) -> Call:
    """What all prompts of a request share; checks what does not depend on the prompt."""
    here = service(request)
    body.check(here.args.allow_unknown_fields)
    here.check_model(body.model)
    if body.priority and here.llm.args.scheduling_policy != "priority":
        raise APIError(400, "priority needs a server that runs with --scheduling-policy priority", "priority")
    return Call(f"{prefix}-{request_id(request)}", body.timeout, body.priority, body.cache_salt)
