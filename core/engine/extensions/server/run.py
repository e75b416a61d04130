"""The server's process: listen, serve, and end in order.

SIGTERM or SIGINT once: new requests get 503, those that run finish, at most for the drain time. Twice: end now.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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

REFRESH_SECONDS = 10.0
"""How often the files of certificates are looked at."""


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
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        ssl_ca_certs=args.ssl_ca_certs or None,
        ssl_cert_reqs=2 if args.ssl_ca_certs else 0,  # ask for a client's certificate, and insist
        timeout_keep_alive=args.keep_alive_timeout,
        timeout_graceful_shutdown=5,
    )
    _load(config)
    server = _Server(config, service)
    sock = _listen(args) if args.uds is None else _listen_locally(args.uds)
    refreshing = asyncio.create_task(_refresh(config)) if config.ssl is not None else None
    try:
        await server.serve([sock])
    finally:
        if refreshing is not None:
            refreshing.cancel()
        if args.uds is not None:
            Path(args.uds).unlink(missing_ok=True)
    if server.fatal is not None:
        raise server.fatal
    return 0


def _load(config: uvicorn.Config) -> None:
    """Read the certificates."""
    try:
        config.load()
    except OSError as error:  # which ssl.SSLError is
        raise ConfigError(f"ssl_certfile, ssl_keyfile or ssl_ca_certs cannot be read: {error}") from error


async def _refresh(config: uvicorn.Config) -> None:
    """Read certificates again when their files change: whoever connects from then on sees the new ones."""
    assert config.ssl is not None
    assert config.ssl_certfile is not None
    files = [Path(file) for file in (config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs) if file]
    seen = _times(files)
    while True:
        await asyncio.sleep(REFRESH_SECONDS)
        if (now := _times(files)) == seen:
            continue
        seen = now
        try:
            # A key that does not fit yet would leave the server without any, so it is tried elsewhere first.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
            config.ssl.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
            if config.ssl_ca_certs:
                config.ssl.load_verify_locations(config.ssl_ca_certs)
            log.info("the TLS certificate was read again")
        except OSError as error:
            log.error("the TLS certificate has changed and cannot be read, so the old one stays: %s", error)


def _times(files: Sequence[Path]) -> list[float | None]:
    return [_time(file) for file in files]


def _time(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:  # it is being replaced
        return None


def _listen(args: ServerArgs) -> socket.socket:
    """A socket on the host and port."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        return _bound(socket.socket(family, kind), address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {args.host} port {args.port}: {error}; choose another --port") from error


def _listen_locally(path: str) -> socket.socket:
    """A Unix socket; one that a server has left behind gives way, one where somebody listens does not."""
    try:
        if Path(path).is_socket():
            with socket.socket(socket.AF_UNIX) as other:
                if other.connect_ex(path) != errno.ECONNREFUSED:  # one where we may not connect is in use too
                    raise ConfigError(f"another server listens on {path}; choose another --uds")
            Path(path).unlink()
        return _bound(socket.socket(socket.AF_UNIX), path)
    except OSError as error:
        raise ConfigError(f"cannot listen on {path}: {error}; choose another --uds") from error


def _bound(sock: socket.socket, address: Any) -> socket.socket:
    """The socket, which listens."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError:
        sock.close()
        raise
    return sock


def _address(sock: socket.socket, scheme: str) -> str:
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    """Uvicorn's, which drains first and keeps its ears open meanwhile."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.fatal: EngineError | None = None
        self._service = service
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell the address once what the line promises is true: who comes is answered, and a signal drains."""
        await super().startup(sockets)
        for sock in () if self.should_exit else sockets or ():
            log.info("listening on %s", _address(sock, "https" if self.config.is_ssl else "http"))

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
