"""The engine core in a process of its own, and the messages that it exchanges.

A socket pair carries msgpack frames behind a four-byte length; nothing is pickled. The child is a plain ``python -m``
of this module, so a user's script needs no main guard. It ends when the socket closes, whatever it is doing then, so it
never outlives its parent.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from typing import Any

import msgspec

from engine.config import EngineArgs
from engine.errors import EngineError, RequestError
from engine.request import CoreOutput, CoreRequest

LENGTH = struct.Struct(">I")


class Start(msgspec.Struct, tag=True):
    """Parent to child, first: load this."""

    args: EngineArgs


class Add(msgspec.Struct, tag=True):
    """Parent to child: run these."""

    requests: list[CoreRequest]


class Abort(msgspec.Struct, tag=True):
    """Parent to child: end these; unknown ids are ignored."""

    request_ids: list[str]


class ResetPrefixCache(msgspec.Struct, tag=True):
    """Parent to child: forget cached prompts."""


class Ready(msgspec.Struct, tag=True):
    """Child to parent, once: the model is loaded. `info` is an `EngineInfo` as a dictionary."""

    info: dict[str, Any]


class Outputs(msgspec.Struct, tag=True):
    """Child to parent: what a step brought."""

    outputs: list[CoreOutput]


class Refused(msgspec.Struct, tag=True):
    """Child to parent: a request that can never run."""

    request_id: str
    message: str


class Failed(msgspec.Struct, tag=True):
    """Child to parent, last: the core cannot go on. `kind` is the exception's class name."""

    kind: str
    message: str
    traceback: str


ToCore = Start | Add | Abort | ResetPrefixCache
FromCore = Ready | Outputs | Refused | Failed


def pack(message: ToCore | FromCore) -> bytes:
    """A frame."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


def spawn() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a child that waits for `Start`; the parent's end of the socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        child = subprocess.Popen(
            [sys.executable, "-m", "engine.extensions.serving.core_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    return child, ours


class _Inbox:
    """Reads frames on a thread; the end of the stream ends the process at once."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rb")
        self._decode = msgspec.msgpack.Decoder(ToCore).decode
        self._queue: queue.SimpleQueue[ToCore] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True, name="inbox").start()

    def _read(self) -> None:
        while len(head := self._file.read(LENGTH.size)) == LENGTH.size:
            (size,) = LENGTH.unpack(head)
            self._queue.put(self._decode(self._file.read(size)))
        os._exit(0)

    def get(self, block: bool) -> ToCore | None:
        """The next message; None when there is none and `block` is false."""
        try:
            return self._queue.get(block)
        except queue.Empty:
            return None


def serve(sock: socket.socket) -> None:
    """The child's life: load, then add, abort and step until the parent closes the socket."""
    inbox = _Inbox(sock)
    start = inbox.get(block=True)
    assert isinstance(start, Start)
    try:
        from engine.engine import EngineCore

        core = EngineCore(start.args)
        sock.sendall(pack(Ready(msgspec.to_builtins(core.info))))
        while True:
            while (message := inbox.get(block=not core.has_work())) is not None:
                if isinstance(message, Add):
                    for request in message.requests:
                        try:
                            core.add(request)
                        except RequestError as error:
                            sock.sendall(pack(Refused(request.request_id, str(error))))
                elif isinstance(message, Abort):
                    core.abort(message.request_ids)
                elif isinstance(message, ResetPrefixCache):
                    core.reset_prefix_cache()
            if outputs := core.step():
                sock.sendall(pack(Outputs(outputs)))
    except OSError:  # the parent is gone
        pass
    except Exception as error:
        text = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        sock.sendall(pack(Failed(type(error).__name__, text, traceback.format_exc())))


def main() -> None:
    """Entry point of the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
