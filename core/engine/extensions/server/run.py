"""The server's process: listen, serve, and end in order.

SIGTERM or SIGINT once: new requests get 503, those that run finish, at most for the drain time. Twice: end now.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from engine.config import EngineArgs
from engine.errors import ConfigError, EngineError
from engine.extensions.server import logs
from engine.extensions.server.app import build
from engine.extensions.server.args import ServerArgs
from engine.extensions.server.service import Service
from engine.extensions.serving import AsyncLLM

log = logging.getLogger(__name__)


def serve(args: ServerArgs, engine: EngineArgs) -> int:
    """Serve until a signal, or until the engine has ended; the exit code.

    Raises:
        ConfigError: an option cannot work.
        EngineError: the model cannot be loaded, or the engine's process ended and is not restarted.
    """
    logs.configure(args.log_format, args.log_level)
    return asyncio.run(_serve(args, lambda: AsyncLLM.of(engine)))


async def _serve(args: ServerArgs, make: Any) -> int:
    server: _Server

    def fatal(error: EngineError) -> None:
        server.fatal = error
        server.should_exit = True

    service = Service(args, make, fatal)
    config = uvicorn.Config(
        build(args, service),
        host=args.host,
        port=args.port,
        uds=args.uds,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        ssl_ca_certs=args.ssl_ca_certs or None,
        ssl_cert_reqs=2 if args.ssl_ca_certs else 0,  # ask for a client's certificate, and insist
        timeout_graceful_shutdown=5,
    )
    server = _Server(config, service)
    sockets = [_listen(args)] if not args.uds else None
    log.info("listening on %s", _address(args, sockets))
    await server.serve(sockets)
    if server.fatal is not None:
        raise server.fatal
    return 0


def _listen(args: ServerArgs) -> socket.socket:
    """A socket that listens, so that what the log tells is true: whoever comes from now on is answered."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {args.host} port {args.port}: {error}; choose another --port") from error
    return sock


def _address(args: ServerArgs, sockets: list[socket.socket] | None) -> str:
    if sockets is None:
        return f"unix:{args.uds}"
    host, port = sockets[0].getsockname()[:2]
    return f"{'https' if args.ssl_certfile else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    """Uvicorn's, which drains first and keeps its ears open meanwhile."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.fatal: EngineError | None = None
        self._service = service
        self._draining: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first signal drains, the second ends at once; the process then exits normally."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await self._service.drain()
        self.should_exit = True
