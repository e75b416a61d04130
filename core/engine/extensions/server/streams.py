"""Answers that stop working when nobody listens any more, and server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from engine.extensions.server.errors import as_api_error

T = TypeVar("T")
log = logging.getLogger(__name__)

encode = msgspec.json.Encoder().encode
"""Any answer as JSON."""

DONE = b"data: [DONE]\n\n"
"""The last event of OpenAI's streams."""

COMMENT = b": keep-alive\n\n"
"""What clients pass over, and proxies take for a sign of life."""


class ClientDisconnected(Exception):  # noqa: N818 - it is no error
    """The client has closed its connection; what it asked for was given up."""


async def connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client is gone.

    Raises:
        ClientDisconnected: it is gone.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()  # does nothing where it is done
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(request: Request, work: Coroutine[Any, Any, Any]) -> Response:
    """What `work` returns, as JSON; nothing where the client left before."""
    try:
        return JSON(await connected(request.receive, work))
    except ClientDisconnected:
        return Response(status_code=499)


class JSON(Response):
    """A JSON answer of anything that msgspec encodes."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return encode(content)


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + encode(data) + b"\n\n"


class EventStream(Response):
    """Sends events as they come.

    Nothing is sent before the first one, so a request that fails at once has its proper status. Later failures are an
    event with an ``error``. Where the client reads slowly, `send` waits, and the engine's outputs are joined meanwhile.

    Args:
        events: encoded; closed in any case.
        keep_alive: seconds without an event after which a comment is sent; 0 sends none.
        last: sent at the end, after an error too.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], keep_alive: float = 0.0, last: bytes = DONE) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._keep_alive = keep_alive
        self._last = last
        self._begun = False
        self._silent = True
        self._turn = asyncio.Lock()  # events and comments are sent one at a time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all; returns early when the client leaves."""
        try:
            await connected(receive, self._send(send))
        except (ClientDisconnected, OSError):
            log.debug("a client left its stream")

    async def _send(self, send: Send) -> None:
        beating = asyncio.create_task(self._beat(send)) if self._keep_alive else None
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    await self._put(send, data)
        except Exception as error:
            if not self._begun:
                raise
            await self._put(send, event(as_api_error(error).body()))
        finally:
            if beating is not None:
                beating.cancel()
        await self._put(send, self._last, more=False)

    async def _put(self, send: Send, data: bytes, more: bool = True) -> None:
        async with self._turn:
            if not self._begun:
                self._begun = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._silent = False
            await send({"type": "http.response.body", "body": data, "more_body": more})

    async def _beat(self, send: Send) -> None:
        """Send a comment whenever nothing else was sent for a while."""
        with suppress(OSError):  # the client left; `connected` knows it too
            while True:
                await asyncio.sleep(self._keep_alive)
                if self._silent:
                    await self._put(send, COMMENT)
                self._silent = True
