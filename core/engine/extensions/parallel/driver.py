"""The executor of several ranks: what drives them, and a watch over them, wherever they run.

    driver --- steps ---> every rank
           <-- results of one rank, and the last words of any, through a socket each

A rank that ends, in whatever way, is seen at once. One that hangs is seen when no rank has entered a collective for
`distributed_timeout_seconds`, and is the one that has entered the fewest; one that is stopped, sooner. Then all ranks
are ended, and the error names it. The ranks end with the driver, whatever becomes of it.
"""

from __future__ import annotations

import select
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import msgspec
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from engine import errors
from engine.config import EngineArgs
from engine.errors import ConfigError, EngineDeadError, EngineError
from engine.extensions.parallel import messages
from engine.extensions.parallel.messages import FromRank
from engine.info import EngineInfo
from engine.kv.pool import KVPlan
from engine.step import Step, StepResult

M = TypeVar("M", bound=FromRank)

TICK = 0.5
"""Seconds between two looks at the ranks' progress."""

_STILL = 15.0
"""Seconds without progress after which a rank that does nothing at all is no longer waited for."""

_LAST_WORDS = 1.0
"""Seconds that ranks have to say what else went wrong, since the first to speak may only be the first to notice."""


class RanksExecutor:
    """Runs a model on `args.world_size` ranks. See `engine.engine.Executor`.

    Args:
        args: the options.
        start: starts the ranks, which wait for `messages.Start`.
        progress: the first rank shows how far it is.
    """

    def __init__(self, args: EngineArgs, start: Callable[[EngineArgs], Ranks], *, progress: bool = False) -> None:
        if args.enable_expert_parallel and args.tensor_parallel_size == 1:
            raise ConfigError(
                "enable_expert_parallel deals experts out to ranks; set tensor_parallel_size to their number"
            )
        if args.tensor_parallel_size % args.decode_context_parallel_size:
            raise ConfigError(
                f"decode_context_parallel_size {args.decode_context_parallel_size} groups the ranks that split layers; "
                f"it must divide tensor_parallel_size, which is {args.tensor_parallel_size}"
            )
        self._ranks = start(args)
        try:
            self._ranks.send(messages.Start(self._ranks.args, self._ranks.store, progress))
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
        launched = _Launched(self)
        if not self.overlap:  # what a rank computes is there at once, and should not wait for the step after it
            launched.ask()
        return launched

    def ask(self) -> None:
        """Ask for what the oldest step gave, that was not asked for yet."""
        self._ranks.send(messages.Collect())

    def answer(self) -> StepResult:
        """Wait for what was asked for."""
        result = self._ranks.answer(messages.Result).result
        if self.scheduler_config.stages > 1:
            self._ranks.send(messages.Drawn(result.token_ids))
        return result

    def watch(self) -> None:
        """Raise where a rank is gone, or none makes progress; for those that wait for several executors."""
        self._ranks.watch()

    def check(self) -> None:
        """Raise where a rank is gone, while nothing runs."""
        self._ranks.check()

    def end(self) -> None:
        """End all ranks, now."""
        self._ranks.end()

    def fileno(self) -> int:
        """Becomes readable when an answer is there, or its rank is gone."""
        return self._ranks.fileno()

    def info(self, load_seconds: float) -> EngineInfo:
        """The first rank's, with the bytes of all."""
        own = {"load_seconds": load_seconds, "weight_bytes": self._weight_bytes}
        return msgspec.convert({**self._info, **own}, EngineInfo)


class _Launched:
    def __init__(self, executor: RanksExecutor) -> None:
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


class Ranks(ABC):
    """What a driver knows of its ranks: tells, hears, watches and ends them.

    A subclass starts them, and says how they are told something, how far they are, and what becomes of them.

    Args:
        args: the options, for the ranks too.
        sockets: of each rank, where it is heard; one that is closed at the other end is a rank that is gone.
        host: this machine's address, as the ranks know it.
    """

    def __init__(self, args: EngineArgs, sockets: Sequence[socket.socket], host: str) -> None:
        self.args = args
        self._size, self._timeout = args.world_size, args.distributed_timeout_seconds
        self._width = args.tensor_parallel_size
        self._speaker = self._size - self._width
        self._sockets = list(sockets)
        # The store lives here, so that no rank ends before another one is done with it.
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(hours=1))
        self.store = (host, self._store.port)
        self._poll = select.poll()
        for sock in self._sockets:
            self._poll.register(sock, select.POLLIN)
        self._dead: EngineError | None = None
        self._seen: tuple[list[int], list[int]] = ([], [])
        self._idle = self._looked = 0.0

    @abstractmethod
    def _write(self, data: bytes) -> None:
        """Give `data` to all ranks; calls `_look` while it waits for them."""

    @abstractmethod
    def _progress(self) -> tuple[list[int], list[int]]:
        """Of each rank, how many messages it has read and how many collectives it has entered."""

    @abstractmethod
    def _stopped(self) -> list[int]:
        """Ranks that do nothing at all, not even in other threads."""

    @abstractmethod
    def _where(self, rank: int) -> str:
        """A rank's process, for a message."""

    @abstractmethod
    def _how(self, rank: int) -> str:
        """How a rank that is gone has ended, for a message: "was ..." """

    @abstractmethod
    def _kill(self) -> None:
        """End all ranks, now; called any number of times."""

    def send(self, message: messages.ToRank) -> None:
        """To all ranks."""
        if self._dead is not None:
            raise self._dead
        self._idle, self._looked = 0.0, time.monotonic()  # while nothing runs, nothing has to move
        self._write(messages.pack(message))

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
        self._kill()

    def _wait(self, ranks: set[int], kind: type[M], *, patient: bool) -> dict[int, M]:
        found: dict[int, M] = {}
        while found.keys() != ranks:
            for rank in self._speaking(TICK):
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

    def check(self) -> None:
        """Raise where a rank is gone; only while no answer is expected."""
        for rank in self._speaking(0):
            raise self._fail({rank: messages.receive(self._sockets[rank])}, loading=False)

    def fileno(self) -> int:
        """Of the socket where results come from."""
        return self._sockets[self._speaker].fileno()

    def _look_for_progress(self) -> None:
        now = time.monotonic()
        if (passed := now - self._looked) < TICK:
            return
        self._looked, before, self._seen = now, self._seen, self._progress()
        if self._seen != before:
            self._idle = 0.0
            return
        self._idle += min(passed, 2 * TICK)  # more than that: this process itself was stopped, or did something else
        if self._idle > self._timeout or (self._idle > _STILL and self._stopped()):
            raise self._hung(*self._seen)

    def _speaking(self, seconds: float) -> list[int]:
        """Ranks whose sockets have something to read, their end included; raises once all were ended."""
        if self._dead is not None:
            raise self._dead
        ready = {fd for fd, _ in self._poll.poll(1000 * seconds)}
        return [rank for rank, sock in enumerate(self._sockets) if sock.fileno() in ready]

    def _look(self) -> None:
        """Raise where a rank is gone or has failed, or none makes progress, while none can be told more."""
        for rank in self._speaking(0):
            if messages.ended(self._sockets[rank]):  # behind results, perhaps, that were not asked for yet
                raise self._fail({rank: messages.last(self._sockets[rank])}, loading=False)
        self._look_for_progress()

    def _fail(self, words: dict[int, FromRank | None], *, loading: bool) -> EngineError:
        """End all ranks, and tell why: the first to speak may only be the first to notice."""
        for rank in words:  # that it ends, after its last words, tells nothing
            self._poll.unregister(self._sockets[rank])
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
            error = _revive(failed[rank], self._name(rank), loading)
        else:
            error = EngineDeadError(
                f"{self._name(gone[0])} {self._how(gone[0])}; running requests are lost, and the other ranks were "
                "ended. Start a new engine"
            )
        self._dead = error
        self.end()
        return error

    def _hung(self, read: list[int], entered: list[int]) -> EngineDeadError:
        # Stages wait for those before them, and those before run on: the first that has read the least is behind.
        stages = [range(first, first + self._width) for first in range(0, self._size, self._width)]
        stage = min(stages, key=lambda ranks: min(read[rank] for rank in ranks))
        behind = [rank for rank in stage if entered[rank] < max(entered[r] for r in stage)]
        stopped = self._stopped()
        behind = stopped or behind or (list(stage) if len(stages) > 1 else [])
        names = ", ".join(f"rank {rank} ({self._where(rank)})" for rank in behind) or "no rank more than others"
        error = EngineDeadError(
            f"the {self._size} ranks made no progress for {self._idle:.0f} s, and {names} is "
            f"{'stopped' if stopped else 'behind'}; all were ended, and running requests are lost. "
            + ("Start a new engine" if stopped else "If a step may take that long, raise distributed_timeout_seconds")
        )
        self._dead = error
        self.end()
        return error

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {self._size} ({self._where(rank)})"


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
