"""One rank: loads its share of the model, and runs the steps that it is told, in a process of its own."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, Protocol, cast

import msgspec

from engine.config import EngineArgs
from engine.errors import EngineError
from engine.extensions.parallel import messages
from engine.extensions.parallel.channel import Memory, Reader
from engine.extensions.parallel.messages import FromRank


class Line(Protocol):
    """What connects a rank with its driver. Once the driver is gone it ends the process, whatever that is doing then.

    Attributes:
        rank, size: which rank this is, and of how many.
    """

    rank: int
    size: int

    def receive(self) -> bytes:
        """The next message; waits for it."""

    def send(self, message: FromRank) -> None:
        """Answer."""

    def entered(self) -> None:
        """Count a collective that is entered, so that the driver sees which rank is behind."""


class LocalLine:
    """To a driver on this machine: shared memory and a bell, where messages come from, and a socket for answers."""

    def __init__(self, rank: int, size: int, memory: int, bell: int, fd: int) -> None:
        self.rank, self.size = rank, size
        self._sock = socket.socket(fileno=fd)
        threading.Thread(target=self._end_with_driver, daemon=True, name="driver").start()
        self._memory = Memory(memory, size)
        self._reader = Reader(self._memory, bell, rank)

    def receive(self) -> bytes:
        """See `Line.receive`."""
        return self._reader.receive()

    def send(self, message: FromRank) -> None:
        """See `Line.send`."""
        messages.send(self._sock, message)

    def entered(self) -> None:
        """See `Line.entered`."""
        self._memory.entered[self.rank] += 1

    def _end_with_driver(self) -> None:
        with suppress(OSError):  # an error where the driver has not read all
            self._sock.recv(1)  # it never writes here
        os._exit(0)


def main() -> None:
    """Entry point of a process on the driver's machine: ``rank size memory bell socket``, whole numbers."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and systemd reach the whole group; the driver decides
        signal.signal(number, signal.SIG_IGN)
    line = LocalLine(*map(int, sys.argv[1:]))
    serve(line, lambda args: args.device_index + line.rank)


def serve(line: Line, device: Callable[[EngineArgs], int]) -> None:
    """A rank's life, which ends with the process; `device` tells the index of its device."""
    if line.rank:
        logging.getLogger("engine").setLevel(logging.ERROR)  # the first rank warns for all
    try:
        _run(line, device)
    except Exception as error:
        text = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # the driver is gone, which ends this process too
            line.send(messages.Failed(type(error).__name__, text, traceback.format_exc()))
    threading.Event().wait()  # the driver says when to end: a process that ends makes others fail, and hide the cause


def _run(line: Line, device: Callable[[EngineArgs], int]) -> None:
    from engine.extensions.parallel import pipeline

    start = messages.unpack(line.receive())
    assert isinstance(start, messages.Start)
    runner = _load(start, line, device(start.args))
    plan = runner.kv_plan
    ready = messages.Ready(
        groups=[messages.encode_group(group) for group in plan.groups],
        slices=plan.slices,
        block_bytes=plan.block_bytes,
        cache=runner.cache_config,
        scheduler=runner.scheduler_config,
        overlap=runner.overlap,
        info=msgspec.to_builtins(runner.info(load_seconds=0.0)),
    )
    line.send(ready)
    launched: deque[Any] = deque()
    decides = line.size - start.args.tensor_parallel_size  # the first rank of the last stage
    if line.rank < decides:
        pipeline.draw_nothing(runner)
    while True:
        message = messages.unpack(line.receive())
        if isinstance(message, messages.Run):
            launched.append(runner.launch(message.step))
        elif isinstance(message, messages.Drawn):
            if line.rank < decides:
                pipeline.learn(runner, launched.popleft(), message.token_ids)
        elif line.rank >= decides:
            result = launched.popleft().collect()
            if line.rank == decides:
                line.send(messages.Result(result))


def _load(start: messages.Start, line: Line, device_index: int) -> Any:
    """The runner of this rank's share."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from engine.engine import make_runner
    from engine.extensions.parallel.collectives import Group
    from engine.extensions.parallel.context import ContextPlatform
    from engine.extensions.parallel.share import RankShare
    from engine.interfaces import GroupSpec, Platform

    args, rank, size = replace(start.args, device_index=device_index), line.rank, line.size

    def wait() -> None:
        line.send(messages.Loaded())
        assert isinstance(messages.unpack(line.receive()), messages.Go)

    def share(platform: Platform) -> tuple[Platform, RankShare]:
        platform.device().activate()
        timeout = 2 * args.distributed_timeout_seconds  # the driver, which knows who is behind, speaks first
        store = TCPStore(*start.store, world_size=size + 1, is_master=False, timeout=timedelta(seconds=timeout))
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))

        def group(role: str, ranks: range) -> Group:
            return Group(platform.communicator(GroupSpec(role, tuple(ranks), rank, timeout)), line.entered)

        width = args.tensor_parallel_size
        first = rank // width * width
        tensor = group("tp", range(first, first + width))
        stages = group("pp", range(rank - first, size, width)) if width < size else None
        everyone = tensor if stages is None else stages if width == 1 else group("world", range(size))
        mine = RankShare(
            everyone,
            platform.device(),
            tensor=tensor,
            stages=stages,
            experts=args.enable_expert_parallel,
            context=args.decode_context_parallel_size,
            wait=wait,
        )
        if (count := args.decode_context_parallel_size) == 1:
            return platform, mine
        context = group("cp", range(rank // count * count, (rank // count + 1) * count))
        return cast("Platform", ContextPlatform(platform, context)), mine

    return make_runner(args, share if size > 1 else None, progress=rank == 0 and start.progress)
