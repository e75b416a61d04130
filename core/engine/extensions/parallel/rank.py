"""One rank: a process that loads its share of the model, and runs the steps that it is told.

Its driver gives it three file descriptors: shared memory and a bell, where messages come from, and a socket, where
answers go to. Once the socket closes, the driver is gone, and the rank ends at once, whatever it is doing then.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from dataclasses import replace
from datetime import timedelta
from typing import Any

import msgspec

from engine.errors import EngineError
from engine.extensions.parallel import messages
from engine.extensions.parallel.channel import Memory, Reader


def main() -> None:
    """Entry point of the process: ``rank size memory bell socket``, whole numbers."""
    rank, size, memory, bell, fd = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides
    sock = socket.socket(fileno=fd)
    threading.Thread(target=_end_with, args=(sock,), daemon=True, name="driver").start()
    if rank:
        logging.getLogger("engine").setLevel(logging.ERROR)  # the first rank warns for all
    shared = Memory(memory, size)
    try:
        _serve(rank, size, shared, Reader(shared, bell, rank), sock)
    except Exception as error:
        text = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        messages.send(sock, messages.Failed(type(error).__name__, text, traceback.format_exc()))
        sock.recv(1)  # the driver says when to end: a process that ends makes others fail, and hide the cause
    os._exit(0)


def _end_with(sock: socket.socket) -> None:
    """Wait for the end of the driver, which never writes here."""
    sock.recv(1)
    os._exit(0)


def _serve(rank: int, size: int, shared: Memory, reader: Reader, sock: socket.socket) -> None:
    start = messages.unpack(reader.receive())
    assert isinstance(start, messages.Start)
    runner = _load(start, rank, shared, reader, sock)
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
    messages.send(sock, ready)
    launched: deque[Any] = deque()
    while True:
        message = messages.unpack(reader.receive())
        if isinstance(message, messages.Run):
            launched.append(runner.launch(message.step))
        else:
            result = launched.popleft().collect()
            if rank == size - start.args.tensor_parallel_size:
                messages.send(sock, messages.Result(result))


def _load(start: messages.Start, rank: int, shared: Memory, reader: Reader, sock: socket.socket) -> Any:
    """The runner of this rank's share."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from engine.engine import make_runner
    from engine.extensions.parallel.collectives import Group
    from engine.extensions.parallel.share import RankShare
    from engine.interfaces import GroupSpec, Platform
    from engine.plugins import get_hooks

    def entered() -> None:
        shared.entered[rank] += 1

    def wait() -> None:
        messages.send(sock, messages.Loaded())
        assert isinstance(messages.unpack(reader.receive()), messages.Go)

    def share(platform: Platform) -> RankShare:
        platform.device().activate()
        timeout = 2 * args.distributed_timeout_seconds  # the driver, which knows who is behind, speaks first
        store = TCPStore(*start.store, world_size=size + 1, is_master=False, timeout=timedelta(seconds=timeout))
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))

        def group(role: str, ranks: range) -> Group:
            return Group(platform.communicator(GroupSpec(role, tuple(ranks), rank, timeout)), entered)

        width = args.tensor_parallel_size
        first = rank // width * width
        tensor = group("tp", range(first, first + width))
        stages = group("pp", range(rank - first, size, width)) if width < size else None
        everyone = tensor if stages is None else stages if width == 1 else group("world", range(size))
        experts = args.enable_expert_parallel
        return RankShare(everyone, platform.device(), tensor=tensor, stages=stages, experts=experts, wait=wait)

    args, size = replace(start.args, device_index=start.device_indices[rank]), len(start.device_indices)
    return make_runner(args, get_hooks(), share if size > 1 else None, progress=rank == 0 and start.progress)
