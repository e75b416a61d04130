"""What those who run it ask: ``/health``, ``/ready``, ``/version``, ``/metrics``, ``/status``, and the page, ``/``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from engine.extensions.server import context
from engine.extensions.server.errors import APIError, unavailable
from engine.extensions.server.service import State
from engine.extensions.server.streams import JSON
from engine.version import __version__

router = APIRouter()

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


@router.get("/health")
async def health(request: Request) -> JSON:
    """200 while the engine lives: it serves, or finishes what runs before it ends. 503 while it loads, or is dead."""
    service = context.service(request)
    if service.state in (State.STARTING, State.DEAD):
        _ = service.llm  # raises 503 with the reason
    return JSON({"status": service.state.value})


@router.get("/ready")
async def ready(request: Request) -> JSON:
    """200 while new requests are taken; 503 while the model loads, the server drains, or the queue is full."""
    service = context.service(request)
    _ = service.llm
    try:
        service.check_room(1)
    except APIError as full:
        raise unavailable(full.message) from None
    return JSON({"status": "ready"})


@router.get("/version")
async def version() -> JSON:
    """Of the engine."""
    return JSON({"version": __version__})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(context.service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/status")
async def status(request: Request) -> JSON:
    """What runs, how busy it is, and how long the latest requests took: what the page shows."""
    service = context.service(request)
    found: dict[str, Any] = {"state": service.state.value, "model": service.names[0], "version": __version__}
    if service.state in (State.SERVING, State.DRAINING):
        info = service.info
        found["engine"] = {
            "architecture": info.architecture,
            "platform": info.platform,
            "device": info.device,
            "dtype": info.dtype,
            "max_model_len": info.max_model_len,
            "max_num_seqs": info.max_num_seqs,
            "weight_bytes": info.weight_bytes,
            "kv_bytes": info.kv_bytes,
            "tasks": info.pooling.get("tasks") or ["generate"],
            "chat": context.chat(request).available(service),
        }
        found["load"] = msgspec.to_builtins(service.load()) | {"in_flight": service.in_flight}
        metrics = service.metrics
        found["tokens"] = {"read": metrics.num_read, "made": metrics.num_made}
        latest = list(metrics.latest)
        found["latest"] = {
            "num_requests": len(latest),
            "first_token": _percentiles(t.first_token for t in latest),
            "per_token": _percentiles(t.per_token for t in latest if t.per_token is not None),
            "whole": _percentiles(t.whole for t in latest),
        }
    return JSON(found)


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """One page that shows the status and lets a person try a prompt."""
    return HTMLResponse(_page(), headers={"Content-Security-Policy": _POLICY})


@cache
def _page() -> str:
    return Path(__file__).parents[1].joinpath("page.html").read_text()


def _percentiles(seconds: Iterable[float]) -> dict[str, float] | None:
    values = sorted(seconds)
    if not values:
        return None
    return {"median": statistics.median(values), "p95": values[min(len(values) - 1, int(0.95 * len(values)))]}
