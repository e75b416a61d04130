"""What every request passes, before and after its route: its id, API key, size and type, log and metrics."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.extensions.server import logs
from engine.extensions.server.args import ServerArgs
from engine.extensions.server.errors import APIError
from engine.extensions.server.metrics import Metrics

log = logging.getLogger(__name__)

OPEN = ("/", "/health", "/ready", "/version", "/metrics", "/openapi.json", "/favicon.ico")
"""Paths that need no key: they tell nothing of what users send."""

_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Gate:
    """ASGI middleware, the outermost.

    Args:
        app: what lies behind.
        args: keys, the largest body, and what is logged.
        metrics: counts requests.
    """

    def __init__(self, app: ASGIApp, args: ServerArgs, metrics: Metrics) -> None:
        self._app = app
        self._keys = [key.encode() for key in args.api_keys()]
        self._max_bytes = args.max_request_bytes
        self._metrics = metrics
        self._root = args.root_path.rstrip("/")
        self._access_log = args.access_log
        self._unlogged = {path for given in args.disable_access_log_for_endpoints for path in given.split(",")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.monotonic()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _ID.fullmatch(given) else secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = request_id
        token = logs.request_id.set(request_id)
        status = 499

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if refusal := self._refusal(scope, headers):
                await refusal.response()(scope, receive, answer)
            else:
                await self._app(scope, _limited(receive, self._max_bytes), answer)
        finally:
            seconds = time.monotonic() - begin
            route = getattr(scope.get("route"), "path", "")
            self._metrics.http(route or "other", scope["method"], status, seconds)
            if self._access_log and scope["path"].removeprefix(self._root) not in self._unlogged:
                facts = {"method": scope["method"], "path": scope["path"], "status": status}
                log.info("request", extra={"facts": {**facts, "seconds": round(seconds, 4)}})
            logs.request_id.reset(token)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> APIError | None:
        if self._keys and scope["path"].removeprefix(self._root) not in OPEN and scope["method"] != "OPTIONS":
            brought = headers.get(b"authorization", b"")
            # All keys are compared, each in constant time, so the time tells nothing of any.
            known = [hmac.compare_digest(brought, b"Bearer " + key) for key in self._keys]
            if not any(known):
                return APIError(
                    401,
                    "the request has no valid API key; send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_bytes:
            return _too_large(self._max_bytes)
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                return APIError(415, "the body must be JSON, with the header 'Content-Type: application/json'")
        return None


def _too_large(limit: int) -> APIError:
    return APIError(413, f"the body is larger than {limit} bytes; send less, or raise --max-request-bytes")


def _limited(receive: Receive, limit: int) -> Receive:
    """`receive` that raises once more than `limit` bytes have come; a header may have told less, or nothing."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _too_large(limit)
        return message

    return counted
