"""``/v1/models``: what this server has."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from engine.extensions.server import context
from engine.extensions.server.service import Service
from engine.extensions.server.streams import JSON

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> JSON:
    """All names under which the model may be asked for."""
    service = context.service(request)
    return JSON({"object": "list", "data": [_describe(service, name) for name in service.names]})


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> JSON:
    """One of them."""
    service = context.service(request)
    service.check_model(name)
    return JSON(_describe(service, name))


def _describe(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "engine",
        "root": service.names[0],
        "max_model_len": service.llm.info.max_model_len,
        "tasks": service.llm.info.pooling.get("tasks") or ["generate"],
    }
