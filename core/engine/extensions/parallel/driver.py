"""The executor of several ranks on this machine: a process each, and a watch over them.

    driver --- steps, through shared memory ---> every rank
           <-- results of one rank, and the last words of any, through a socket each

A rank that ends, in whatever way, is seen at once; one that hangs is seen when no rank has entered a collective for
`distributed_timeout_seconds`, and is the one that has entered the fewest. Then all ranks are ended, and the error names
it. The ranks end with the driver, whatever becomes of it.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import msgspec
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from engine import errors
from engine.config import EngineArgs
from engine.errors import ConfigError, EngineDeadError, EngineError
from engine.extensions.parallel import messages
from engine.extensions.parallel.channel import Memory, Writer
from engine.extensions.parallel.messages import FromRank
from engine.info import EngineInfo
from engine.kv.pool import KVPlan
from engine.step import Step, StepResult

M = TypeVar("M", bound=FromRank)

_TICK = 0.5
"""Seconds between two looks at the ranks' progress."""

_LAST_WORDS = 1.0
"""Seconds that ranks have to say what else went wrong, since the first to speak may only be the first to notice."""


class ProcessExecutor:
    """Runs a model on `args.world_size` ranks. See `engine.engine.Executor`."""

    def __init__(self, args: EngineArgs, *, progress: bool = False) -> None:
        if args.enable_expert_parallel and args.tensor_parallel_size == 1:
            raise ConfigError(
                "enable_expert_parallel deals experts out to ranks; set tensor_parallel_size to their number"
            )
        self._ranks = Ranks(args, progress=progress)
        try:
            if args.world_size > 1:
                self._ranks.gather(messages.Loaded)
                self._ranks.send(messages.Go())
            ready = self._ranks.gather(messages.Ready)
        except BaseException:
            self._ranks.end()
            raise
        first = ready[0]
        if any([group[:2] for group in other.groups] != [group[:2] for group in first.groups] for other in ready):
            self._ranks.end()
            raise ConfigError(
                "the stages have different kinds of attention layers, or in another order; choose another "
                "pipeline_parallel_size, such that each has the same"
            )
        self.kv_plan = KVPlan(
            tuple(messages.decode_group(*group) for group in first.groups), first.slices, first.block_bytes
        )
        self.cache_config, self.scheduler_config, self.overlap = first.cache, first.scheduler, first.overlap
        self._info = first.info
        self._weight_bytes = sum(r.info["weight_bytes"] for r in ready)

    def launch(self, step: Step) -> _Launched:
        """Tell all ranks to launch a step."""
        self._ranks.send(messages.Run(step))
        return _Launched(self)

    def ask(self) -> None:
        """Ask for what the oldest step gave, that was not asked for yet."""
        self._ranks.send(messages.Collect())

    def answer(self) -> StepResult:
        """Wait for what was asked for."""
        return self._ranks.answer(messages.Result).result

    def watch(self) -> None:
        """Raise where a rank is gone, or none makes progress; for those that wait for several executors."""
        self._ranks.watch()

    def fileno(self) -> int:
        """Becomes readable when an answer is there, or its rank is gone."""
        return self._ranks.fileno()

    def info(self, load_seconds: float) -> EngineInfo:
        """The first rank's, with the bytes of all."""
        own = {"load_seconds": load_seconds, "weight_bytes": self._weight_bytes}
        return msgspec.convert({**self._info, **own}, EngineInfo)


class _Launched:
    def __init__(self, executor: ProcessExecutor) -> None:
        self._executor, self._asked = executor, False

    def ask(self) -> None:
        """Ask for the result, so that it comes by itself; only the oldest step may be asked for."""
        if not self._asked:
            self._asked = True
            self._executor.ask()

    def collect(self) -> StepResult:
        """See `engine.engine.Launched`."""
        self.ask()
        return self._executor.answer()


class Ranks:
    """The processes: starts, tells, hears and ends them."""

    def __init__(self, args: EngineArgs, *, progress: bool = False) -> None:
        self._size, self._timeout = args.world_size, args.distributed_timeout_seconds
        self._speaker = self._size - args.tensor_parallel_size
        # The store lives here, so that no rank ends before another one is done with it.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(hours=1))
        memory = Memory.create()
        bells = [os.eventfd(0, os.EFD_SEMAPHORE) for _ in range(self._size)]
        pairs = [socket.socketpair() for _ in range(self._size)]
        self._sockets = [ours for ours, _ in pairs]
        self._processes = [
            self._start(rank, memory, bells[rank], theirs.fileno()) for rank, (_, theirs) in enumerate(pairs)
        ]
        self._memory = Memory(memory, self._size)
        self._finalizer = weakref.finalize(self, _end, self._processes, self._sockets, [memory, *bells])
        for _, theirs in pairs:
            theirs.close()
        self._poll = select.poll()
        for sock in self._sockets:
            self._poll.register(sock, select.POLLIN)
        self._dead: EngineError | None = None
        self._seen: object = None
        self._since = 0.0
        self._writer = Writer(self._memory, bells)
        first = args.device_index
        self.send(
            messages.Start(args, [first + r for r in range(self._size)], ("127.0.0.1", self._store.port), progress)
        )

    def _start(self, rank: int, memory: int, bell: int, sock: int) -> subprocess.Popen[bytes]:
        fds = (memory, bell, sock)
        threads = str(max(1, len(os.sched_getaffinity(0)) // self._size))
        return subprocess.Popen(
            [sys.executable, "-c", "from engine.extensions.parallel.rank import main; main()"]
            + [str(n) for n in (rank, self._size, *fds)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            env={"OMP_NUM_THREADS": threads, **os.environ},
        )

    def send(self, message: messages.ToRank) -> None:
        """To all ranks."""
        if self._dead is not None:
            raise self._dead
        self._since = time.monotonic()  # idle time is no lack of progress
        self._writer.send(messages.pack(message), self._look)

    def answer(self, kind: type[M]) -> M:
        """The next message of the rank that has results."""
        return self._wait({self._speaker}, kind, patient=False)[self._speaker]

    def gather(self, kind: type[M]) -> list[M]:
        """The next message of each rank, however long it takes."""
        found = self._wait(set(range(self._size)), kind, patient=True)
        return [found[rank] for rank in range(self._size)]

    def end(self) -> None:
        """End all ranks, now."""
        self._dead = self._dead or EngineDeadError("the engine was shut down")
        self._finalizer()

    def _wait(self, ranks: set[int], kind: type[M], *, patient: bool) -> dict[int, M]:
        found: dict[int, M] = {}
        while found.keys() != ranks:
            for rank in self._speaking(_TICK):
                message = messages.receive(self._sockets[rank])
                if not isinstance(message, kind):
                    raise self._fail({rank: message}, loading=patient)
                found[rank] = message
            if not patient:
                self._look_for_progress()
        return found

    def watch(self) -> None:
        """Raise where a rank is gone, or none makes progress."""
        for rank in self._speaking(0):
            if rank != self._speaker:  # the others say nothing but that they failed
                raise self._fail({rank: messages.receive(self._sockets[rank])}, loading=False)
        self._look_for_progress()

    def fileno(self) -> int:
        """Of the socket where results come from."""
        return self._sockets[self._speaker].fileno()

    def _look_for_progress(self) -> None:
        now = (list(self._memory.done), list(self._memory.entered))
        if now != self._seen:
            self._seen, self._since = now, time.monotonic()
        elif time.monotonic() - self._since > self._timeout:
            raise self._hung()

    def _speaking(self, seconds: float) -> list[int]:
        """Ranks whose sockets have something to read, their end included."""
        ready = {fd for fd, _ in self._poll.poll(1000 * seconds)}
        return [rank for rank, sock in enumerate(self._sockets) if sock.fileno() in ready]

    def _look(self) -> None:
        """Raise where a rank is gone, or none makes progress, while none can be told more."""
        for rank in self._speaking(0):
            if not self._sockets[rank].recv(1, socket.MSG_PEEK):
                raise self._fail({rank: None}, loading=False)
        self._look_for_progress()

    def _fail(self, words: dict[int, FromRank | None], *, loading: bool) -> EngineError:
        """End all ranks, and tell why: the first to speak may only be the first to notice."""
        end = time.monotonic() + _LAST_WORDS
        while len(words) < self._size and (left := end - time.monotonic()) > 0:
            for rank in self._speaking(left):
                words[rank] = messages.receive(self._sockets[rank])
                if not isinstance(words[rank], messages.Failed | None):
                    del words[rank]  # an answer that nobody waits for any more
                else:
                    self._poll.unregister(self._sockets[rank])
        failed = {rank: word for rank, word in sorted(words.items()) if isinstance(word, messages.Failed)}
        causes = [rank for rank, word in failed.items() if word.kind != errors.CommunicatorError.__name__]
        gone = [rank for rank, word in sorted(words.items()) if word is None]
        if causes or not gone:
            rank = (causes or sorted(failed))[0]
            error = _revive(failed[rank], f"rank {rank} of {self._size}", loading)
        else:
            error = self._ended(gone[0])
        self._dead = error
        self.end()
        return error

    def _ended(self, rank: int) -> EngineDeadError:
        process = self._processes[rank]
        try:
            code = process.wait(timeout=5)
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            how = "closed its connection"
        return EngineDeadError(
            f"rank {rank} of {self._size} (process {process.pid}) {how}; running requests are lost, and "
            "the other ranks were ended. Start a new engine"
        )

    def _hung(self) -> EngineDeadError:
        entered = list(self._memory.entered)
        behind = [rank for rank in range(self._size) if _stopped(self._processes[rank].pid)]
        behind = behind or [rank for rank in range(self._size) if entered[rank] < max(entered)]
        names = ", ".join(f"rank {r} (process {self._processes[r].pid})" for r in behind) or "no rank more than others"
        error = EngineDeadError(
            f"the {self._size} ranks made no progress for {self._timeout:g} s, and {names} is behind; all were "
            "ended, and running requests are lost. If a step may take that long, raise distributed_timeout_seconds"
        )
        self._dead = error
        self.end()
        return error


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


def _revive(failed: messages.Failed, who: str, loading: bool) -> EngineError:
    """A rank's exception here: while loading, of its own class where that is one of ours."""
    kind = getattr(errors, failed.kind, None)
    ours = isinstance(kind, type) and issubclass(kind, EngineError) and kind is not errors.UnsupportedCapability
    if loading and ours:
        error: EngineError = kind(failed.message)  # type: ignore[misc]
        return error
    error = EngineDeadError(f"{who}: {failed.message}")
    error.add_note(f"{who} failed:\n{failed.traceback}")
    return error
