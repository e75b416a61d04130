"""The engine core in a process of its own, and the messages that it exchanges.

A socket pair carries msgpack frames behind a four-byte length; nothing is pickled. The child is a Python of its own
that runs `main`, so a user's script needs no main guard. It ends when the socket closes, whatever it is doing then, so
it never outlives its parent.
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
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from engine.config import EngineArgs
from engine.errors import EngineError, RequestError
from engine.extensions.serving import tokenizer as tokenizers
from engine.request import CoreOutput, CoreRequest
from engine.text import load_tokenizer

if TYPE_CHECKING:
    from engine.engine import EngineCore

LENGTH = struct.Struct(">I")

_CHECK = 1.0
"""Seconds between two looks at the ranks while nothing runs."""


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
    """Child to parent, once: the model is loaded. `info` is an `EngineInfo` as a dictionary.

    `tokenizer` is None where there is none, or where it cannot be sent.
    """

    info: dict[str, Any]
    tokenizer: tokenizers.TokenizerData | None


class Load(msgspec.Struct, frozen=True):
    """How busy the core is.

    Attributes:
        num_running, num_waiting: sequences.
        kv_usage: share of the pages that sequences hold, 0 to 1.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found, so far.
        num_preemptions: so far.
        num_steps: so far.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    num_preemptions: int = 0
    num_steps: int = 0


class Outputs(msgspec.Struct, tag=True):
    """Child to parent: what a step brought, and the load after it. No outputs: only the load has changed."""

    outputs: list[CoreOutput]
    load: Load


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
            [sys.executable, "-c", f"from {__name__} import main; main()", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    return child, ours


class _Prepared(msgspec.Struct):
    """To ourselves: what had to be done before a request could be added is done, or has failed."""

    request_id: str
    error: BaseException | None


class _Inbox:
    """Reads frames on a thread; the end of the stream ends the process at once."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rb")
        self._decode = msgspec.msgpack.Decoder(ToCore).decode
        self._queue: queue.SimpleQueue[ToCore | _Prepared] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True, name="inbox").start()

    def _read(self) -> None:
        with suppress(OSError):  # an error where the parent has not read all
            while len(head := self._file.read(LENGTH.size)) == LENGTH.size:
                (size,) = LENGTH.unpack(head)
                self._queue.put(self._decode(self._file.read(size)))
        os._exit(0)

    def put(self, message: _Prepared) -> None:
        """Add a message of this process's own; from any thread."""
        self._queue.put(message)

    def get(self, seconds: float | None = None) -> ToCore | _Prepared | None:
        """The next message; None when there is none within `seconds`, for which None waits for ever."""
        try:
            return self._queue.get(timeout=seconds)
        except queue.Empty:
            return None


def serve(sock: socket.socket) -> None:
    """The child's life: load, then add, abort and step until the parent closes the socket."""
    inbox = _Inbox(sock)
    start = inbox.get()
    assert isinstance(start, Start)
    try:
        from engine.engine import make_core

        core = make_core(start.args)
        sock.sendall(pack(Ready(msgspec.to_builtins(core.info), _tokenizer(start.args, core))))
        _loop(core, inbox, sock)
    except OSError:  # the parent is gone
        pass
    except Exception as error:
        text = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        sock.sendall(pack(Failed(type(error).__name__, text, traceback.format_exc())))


def _tokenizer(args: EngineArgs, core: EngineCore) -> tokenizers.TokenizerData | None:
    if args.skip_tokenizer_init:
        return None
    folder = args.tokenizer or core.info.model
    trust, size = args.trust_remote_code, core.info.vocab_size
    return tokenizers.pack(load_tokenizer(folder, args.tokenizer_mode, trust=trust, vocab_size=size))


class _Entrance:
    """Adds requests; those for which something is prepared on another thread wait here, and no step waits for them."""

    def __init__(self, core: EngineCore, inbox: _Inbox, sock: socket.socket) -> None:
        self._core, self._inbox, self._sock = core, inbox, sock
        self._waiting: dict[str, CoreRequest] = {}

    def admit(self, request: CoreRequest) -> None:
        """Add it now, or when it is prepared."""
        try:
            preparing = self._core.prepare(request)
            if preparing is None:
                self._core.add(request)
                return
        except RequestError as error:
            self._refuse(request.request_id, error)
            return
        name = request.request_id
        self._waiting[name] = request
        preparing.add_done_callback(lambda done: self._inbox.put(_Prepared(name, done.exception())))

    def prepared(self, message: _Prepared) -> None:
        """It can be added, unless it was given up since."""
        request = self._waiting.pop(message.request_id, None)
        if request is not None and message.error is not None:
            self._refuse(message.request_id, message.error)
        elif request is not None:
            self.admit(request)

    def abort(self, request_ids: list[str]) -> None:
        """End requests, wherever they are."""
        for request_id in request_ids:
            self._waiting.pop(request_id, None)
        self._core.abort(request_ids)

    def _refuse(self, request_id: str, error: BaseException) -> None:
        self._sock.sendall(pack(Refused(request_id, str(error))))


def _loop(core: EngineCore, inbox: _Inbox, sock: socket.socket) -> None:
    entrance = _Entrance(core, inbox, sock)
    told, num_steps = Load(), 0
    runner: Any = core.runner
    check = getattr(runner, "check", None)  # ranks in processes of their own, which may end while nothing runs
    while True:
        load = _load(core, num_steps)
        if not core.has_work() and load != told:  # aborts change the load without a step
            sock.sendall(pack(Outputs([], load)))
            told = load
        idle = None if check is None else _CHECK
        while (message := inbox.get(0 if core.has_work() else idle)) is not None:
            if isinstance(message, Add):
                for request in message.requests:
                    entrance.admit(request)
            elif isinstance(message, _Prepared):
                entrance.prepared(message)
            elif isinstance(message, Abort):
                entrance.abort(message.request_ids)
                if not core.has_work():
                    break
            elif isinstance(message, ResetPrefixCache):
                core.reset_prefix_cache()
        if core.has_work():
            outputs = core.step()
            num_steps += 1
            if outputs:
                told = _load(core, num_steps)
                sock.sendall(pack(Outputs(outputs, told)))
        elif check is not None:
            check()


def _load(core: EngineCore, num_steps: int) -> Load:
    return Load(
        num_running=core.scheduler.num_running,
        num_waiting=core.scheduler.num_waiting,
        kv_usage=core.kv.usage(),
        prefix_queries=core.kv.num_queried,
        prefix_hits=core.kv.num_hit,
        num_preemptions=core.scheduler.num_preemptions,
        num_steps=num_steps,
    )


def main() -> None:
    """Entry point of the child."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and systemd reach the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))
