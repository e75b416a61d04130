"""Between a driver and ranks on other machines: two TCP connections each, which the ranks open.

    driver --- steps --->    rank    one message after another, as `messages` has them
           <-- answers ---
           --- a byte --->           how far are you? A thread answers, whatever the rank is doing,
           <-- two counters          and ends the process once the connection is closed

Who connects shows a token that the driver has given its ranks. What travels is plain data; nothing is pickled. It is
not encrypted: collectives, which carry the same contents, are not either.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from engine.extensions.parallel import messages
from engine.extensions.parallel.messages import FromRank

STEPS, WATCH = 0, 1
"""What a connection is for."""

_HELLO = struct.Struct("!32sIB")  # token, rank, what the connection is for
_COUNTERS = struct.Struct("!QQ")  # messages read, collectives entered

_PATIENCE = 5.0
"""Seconds that a connection may take to say who it is."""


class Door:
    """Where a driver lets its ranks in.

    Args:
        host: address of this machine, as the ranks know it.
    """

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = socket.create_server((host, 0), family=family)
        self.address: tuple[str, int] = self._sock.getsockname()[:2]
        self.token = secrets.token_bytes(32)

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *error: object) -> None:
        self._sock.close()

    def admit(self, size: int, waiting: Callable[[], None]) -> tuple[list[socket.socket], list[socket.socket]]:
        """The ranks' connections, for steps and to watch them; `waiting` is called meanwhile, and may raise."""
        found: dict[tuple[int, int], socket.socket] = {}
        self._sock.settimeout(0.2)
        try:
            while len(found) < 2 * size:
                try:
                    sock, _ = self._sock.accept()
                except TimeoutError:
                    waiting()
                    continue
                if (who := self._who(sock)) is None:
                    sock.close()
                else:
                    found[who] = sock
        except BaseException:
            for sock in found.values():
                sock.close()
            raise
        steps, watch = ([found[rank, kind] for rank in range(size)] for kind in (STEPS, WATCH))
        return steps, watch

    def _who(self, sock: socket.socket) -> tuple[int, int] | None:
        """Rank and purpose of a connection; None for one that does not know the token."""
        sock.settimeout(_PATIENCE)
        hello = messages.read(sock, _HELLO.size)
        if hello is None:
            return None
        token, rank, kind = _HELLO.unpack(hello)
        _tune(sock)
        return (rank, kind) if hmac.compare_digest(token, self.token) else None


class Pulse:
    """How far a rank is, as the driver knows it.

    Args:
        sock: the connection to watch it.
        interval: seconds between two questions.
    """

    def __init__(self, sock: socket.socket, interval: float) -> None:
        self._sock, self._interval = sock, interval
        self._counters = (0, 0)
        self._asked: float | None = None
        self._next = 0.0

    def counters(self) -> tuple[int, int]:
        """How many messages it has read and how many collectives it has entered, when it last told."""
        now = time.monotonic()
        with suppress(OSError):  # no answer yet; or the rank is gone, which its other connection tells
            if self._asked is not None:
                if len(self._sock.recv(_COUNTERS.size, socket.MSG_DONTWAIT | socket.MSG_PEEK)) < _COUNTERS.size:
                    return self._counters
                self._counters = _COUNTERS.unpack(self._sock.recv(_COUNTERS.size))
                self._asked = None
            if now >= self._next:
                self._sock.send(b"?", socket.MSG_DONTWAIT)
                self._asked, self._next = now, now + self._interval
        return self._counters

    def stopped(self) -> bool:
        """Whether a question was left without an answer."""
        return self._asked is not None and time.monotonic() - self._asked > 3 * self._interval


class NetworkLine:
    """A rank's end. See `engine.extensions.parallel.rank.Line`."""

    def __init__(self, rank: int, size: int, address: tuple[str, int], token: bytes) -> None:
        self.rank, self.size = rank, size
        self._read = self._entered = 0
        self._steps, self._watch = (self._connect(address, token, kind) for kind in (STEPS, WATCH))
        threading.Thread(target=self._tell, daemon=True, name="driver").start()

    def _connect(self, address: tuple[str, int], token: bytes, kind: int) -> socket.socket:
        sock = socket.create_connection(address, timeout=60)
        sock.sendall(_HELLO.pack(token, self.rank, kind))
        _tune(sock)
        return sock

    def receive(self) -> bytes:
        """See `Line.receive`."""
        data = messages.read_frame(self._steps)
        if data is None:
            os._exit(0)
        self._read += 1
        return data

    def send(self, message: FromRank) -> None:
        """See `Line.send`."""
        messages.send(self._steps, message)

    def entered(self) -> None:
        """See `Line.entered`."""
        self._entered += 1

    def _tell(self) -> None:
        with suppress(OSError):
            while self._watch.recv(1):
                self._watch.sendall(_COUNTERS.pack(self._read, self._entered))
        os._exit(0)


def interface(address: str) -> str | None:
    """The name of the network interface that has an IPv4 address; None where that cannot be told."""
    import fcntl  # POSIX only

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                # SIOCGIFADDR, netdevice(7): a name of 16 bytes in, a sockaddr_in behind it out
                found = fcntl.ioctl(sock, 0x8915, struct.pack("16s240x", name.encode()))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def _tune(sock: socket.socket) -> None:
    """Send at once, wait for ever, and notice within about 15 seconds that the other machine is gone."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 5),
        (socket.TCP_KEEPINTVL, 2),
        (socket.TCP_KEEPCNT, 5),
        (socket.TCP_USER_TIMEOUT, 15_000),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
