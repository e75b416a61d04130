"""The application: every route, what surrounds them, and the OpenAPI document."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from engine.extensions.server import errors
from engine.extensions.server.args import ServerArgs
from engine.extensions.server.chat import Chat
from engine.extensions.server.gate import Gate
from engine.extensions.server.history import Store
from engine.extensions.server.routes import chat, completions, models, operations, responses, tokens
from engine.extensions.server.service import Service
from engine.version import __version__

ROUTERS = (completions.router, chat.router, responses.router, models.router, tokens.router, operations.router)
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
    inner: ASGIApp = app
    if args.cors_origins:
        inner = CORSMiddleware(
            app,
            allow_origins=args.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return Gate(inner, args.api_keys(), args.max_request_bytes, service.metrics, args.access_log)
