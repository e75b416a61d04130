"""The application: every route, what surrounds them, and the OpenAPI document."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from engine.extensions.server import answers, errors, pooling
from engine.extensions.server.args import ServerArgs
from engine.extensions.server.chat import Chat
from engine.extensions.server.gate import Gate
from engine.extensions.server.history import Store
from engine.extensions.server.routes import (
    chat,
    completions,
    embeddings,
    models,
    operations,
    responses,
    scores,
    tokens,
)
from engine.extensions.server.service import Service
from engine.version import __version__

ROUTERS = (
    *(completions.router, chat.router, responses.router, embeddings.router, scores.router),
    *(models.router, tokens.router, operations.router),
)
"""Of all groups of routes."""


def build(args: ServerArgs, service: Service) -> ASGIApp:
    """The server's application; starting it starts the engine, and ending it ends the engine."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncGenerator[None, None]:
        service.start()
        yield
        await service.close()

    app = FastAPI(
        title="engine",
        version=__version__,
        root_path=args.root_path,
        lifespan=life,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.state.chat = Chat(args)
    app.state.store = Store(args.response_store_size)
    for router in ROUTERS:
        app.include_router(router)
    errors.install(app)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    inner: ASGIApp = app
    if args.cors_origins:
        inner = CORSMiddleware(
            app,
            allow_origins=args.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return Gate(inner, args, service.metrics)


ANSWERS: dict[str, type] = {
    "/v1/completions": answers.Completion,
    "/v1/chat/completions": answers.ChatCompletion,
    **dict.fromkeys(("/v1/embeddings", "/pooling", "/v1/score", "/score", "/v1/classify", "/classify"), pooling.Answer),
}
"""Shapes of answers, by route."""


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the answers' shapes and our errors in place of FastAPI's."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = found["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas |= answers.schemas(*ANSWERS.values(), answers.ErrorBody)
    for path, methods in found["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = _content(answers.ErrorBody, "What went wrong")
            if path in ANSWERS:
                operation["responses"]["200"] = _content(ANSWERS[path], "The answer; a stream of pieces of it if asked")
    app.openapi_schema = found
    return found


def _content(shape: type, about: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{shape.__name__}"}
    return {"description": about, "content": {"application/json": {"schema": schema}}}
