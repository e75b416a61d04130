"""Ranks as processes of this machine. Steps reach them through shared memory, answers come through a socket each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path

from engine.config import EngineArgs
from engine.extensions.parallel.channel import Memory, Writer
from engine.extensions.parallel.driver import Ranks


class Processes(Ranks):
    """See `Ranks`."""

    def __init__(self, args: EngineArgs) -> None:
        size = args.world_size
        memory = Memory.create()
        bells = [os.eventfd(0, os.EFD_SEMAPHORE) for _ in range(size)]
        pairs = [socket.socketpair() for _ in range(size)]
        super().__init__(args, [ours for ours, _ in pairs], "127.0.0.1")
        environment = rank_environment(size * args.data_parallel_size)
        self._processes = [
            _start(rank, size, (memory, bells[rank], theirs.fileno()), environment)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        self._finalizer = weakref.finalize(self, _end, self._processes, self._sockets, [memory, *bells])
        for _, theirs in pairs:
            theirs.close()
        self._memory = Memory(memory, size)
        self._writer = Writer(self._memory, bells)

    def _write(self, data: bytes) -> None:
        self._writer.send(data, self._look)

    def _progress(self) -> tuple[list[int], list[int]]:
        return list(self._memory.done), list(self._memory.entered)

    def _stopped(self) -> list[int]:
        return [rank for rank, process in enumerate(self._processes) if _stopped(process.pid)]

    def _where(self, rank: int) -> str:
        return f"process {self._processes[rank].pid}"

    def _how(self, rank: int) -> str:
        try:
            code = self._processes[rank].wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _kill(self) -> None:
        self._finalizer()


def rank_environment(num_neighbours: int) -> dict[str, str]:
    """What a rank needs to know of how many ranks share its machine, in the variables that torch's launcher sets.

    Without a word of the user's, the ranks have an equal share of the processors each.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // num_neighbours))
    return {"OMP_NUM_THREADS": threads, **os.environ, "LOCAL_WORLD_SIZE": str(num_neighbours)}


def _start(rank: int, size: int, fds: tuple[int, int, int], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", "from engine.extensions.parallel.rank import main; main()"]
        + [str(n) for n in (rank, size, *fds)],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        env=environment,
    )


def _end(processes: list[subprocess.Popen[bytes]], sockets: list[socket.socket], fds: list[int]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    for sock in sockets:
        sock.close()
    for fd in fds:
        os.close(fd)


def _stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in "Tt"
