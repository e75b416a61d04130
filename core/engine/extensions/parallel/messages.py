"""What a driver and its ranks say to each other. Plain data as msgpack; nothing is pickled."""

from __future__ import annotations

import select
import socket
import struct
from typing import Any

import msgspec

from engine.config import CacheConfig, EngineArgs, SchedulerConfig
from engine.kv import spec as kv_specs
from engine.kv.spec import KVGroup
from engine.step import Step, StepResult

_LENGTH = struct.Struct("!I")


class Start(msgspec.Struct, tag=True):
    """To all ranks, first: load this.

    Attributes:
        args: the options, as the user gave them.
        store: host and port where the ranks find one another.
        progress: the first rank shows how far it is.
    """

    args: EngineArgs
    store: tuple[str, int]
    progress: bool


class Go(msgspec.Struct, tag=True):
    """To all ranks: each has its weights."""


class Run(msgspec.Struct, tag=True):
    """To all ranks: launch this."""

    step: Step


class Collect(msgspec.Struct, tag=True):
    """To all ranks: the oldest step that was launched is wanted."""


class Drawn(msgspec.Struct, tag=True):
    """To all ranks, where there are stages: what `StepResult.token_ids` were of the oldest step not told of yet."""

    token_ids: list[int | None]


class Loaded(msgspec.Struct, tag=True):
    """From each rank: its weights are there."""


class Ready(msgspec.Struct, tag=True):
    """From each rank: it is waiting for steps. `groups` are specifications by kind, field and layers."""

    groups: list[tuple[str, dict[str, int], tuple[str, ...]]]
    slices: int
    block_bytes: int
    cache: CacheConfig
    scheduler: SchedulerConfig
    overlap: bool
    info: dict[str, Any]


class Result(msgspec.Struct, tag=True):
    """From the first rank of the last stage: what a step gave."""

    result: StepResult


class Failed(msgspec.Struct, tag=True):
    """From a rank, last: it cannot go on. `kind` is the exception's class name."""

    kind: str
    message: str
    traceback: str


ToRank = Start | Go | Run | Collect | Drawn
FromRank = Loaded | Ready | Result | Failed

_from_rank = msgspec.msgpack.Decoder(FromRank).decode
_to_rank = msgspec.msgpack.Decoder(ToRank).decode


def pack(message: ToRank) -> bytes:
    """For the channel."""
    return msgspec.msgpack.encode(message)


def unpack(data: bytes) -> ToRank:
    """From the channel."""
    message: ToRank = _to_rank(data)
    return message


def send(sock: socket.socket, message: FromRank) -> None:
    """A rank's message to the driver."""
    sock.sendall(frame(msgspec.msgpack.encode(message)))
    if isinstance(message, Failed):
        sock.shutdown(socket.SHUT_WR)  # see `ended`


def receive(sock: socket.socket) -> FromRank | None:
    """The next message of a rank; None once it is gone."""
    body = read_frame(sock)
    return _from_rank(body) if body is not None else None


def last(sock: socket.socket) -> Failed | None:
    """What a rank that is gone said last; None where it is no `Failed`."""
    while not isinstance(message := receive(sock), Failed | None):
        pass
    return message


def frame(body: bytes) -> bytes:
    """What is sent over a stream: the length, and the message."""
    return _LENGTH.pack(len(body)) + body


def read_frame(sock: socket.socket) -> bytes | None:
    """The next message of a stream; None at its end."""
    head = read(sock, _LENGTH.size)
    return read(sock, _LENGTH.unpack(head)[0]) if head else None


def read(sock: socket.socket, size: int) -> bytes | None:
    """So many bytes of a stream; None where it ends before."""
    data = bytearray()
    while len(data) < size:
        try:
            part = sock.recv(size - len(data))
        except OSError:  # a machine that is gone ends in errors of several kinds
            return None
        if not part:
            return None
        data += part
    return bytes(data)


def ended(sock: socket.socket) -> bool:
    """Whether the other end is gone or has failed, even where what it said before was not read yet."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def encode_group(group: KVGroup) -> tuple[str, dict[str, int], tuple[str, ...]]:
    """For `Ready`."""
    return type(group.spec).__name__, vars(group.spec), group.layers


def decode_group(kind: str, fields: dict[str, int], layers: tuple[str, ...]) -> KVGroup:
    """From `Ready`."""
    return KVGroup(getattr(kv_specs, kind)(**fields), layers)
