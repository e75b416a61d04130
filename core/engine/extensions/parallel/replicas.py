"""Data parallel: replicas of the engine behind one front, each with ranks of its own; requests go to the least busy.

    add --> the replica with the fewest sequences --> its scheduler, here --> its ranks, each a process

The replicas share nothing but this thread, which schedules for all; while one is scheduled the others compute. A
replica that ends, ends the whole: its sequences could not be told from those that go on.
"""

from __future__ import annotations

import select
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

from engine.config import EngineArgs
from engine.engine import EngineCore
from engine.errors import EngineDeadError
from engine.extensions.parallel.driver import TICK, RanksExecutor
from engine.info import EngineInfo
from engine.request import CoreOutput, CoreRequest


class Replicas:
    """Stands for an `EngineCore`, and for its parts where these are asked for what all replicas have together."""

    def __init__(self, args: EngineArgs, *, progress: bool = False) -> None:
        backend, width = args.distributed_executor_backend or "mp", args.world_size

        def start(index: int) -> EngineCore:
            first = args.device_index + index * width
            own = replace(args, device_index=first, distributed_executor_backend=backend)
            return EngineCore(own, progress=progress and index == 0)

        with ThreadPoolExecutor(args.data_parallel_size) as pool:
            self._cores = list(pool.map(start, range(args.data_parallel_size)))
        self._owner: dict[str, EngineCore] = {}
        self.info: EngineInfo = _sum([core.info for core in self._cores])

    @property
    def scheduler(self) -> Replicas:
        """This, for its numbers; no attribute, since a cycle would keep the ranks when nobody needs them."""
        return self

    kv = runner = scheduler

    def add(self, request: CoreRequest) -> None:
        """See `EngineCore.add`."""
        core = min(self._cores, key=lambda core: (_sequences(core), core.kv.usage()))
        core.add(request)
        self._owner[request.request_id] = core

    def prepare(self, request: CoreRequest) -> Future[None] | None:
        """See `EngineCore.prepare`."""
        return self._cores[0].prepare(request)

    def abort(self, request_ids: Iterable[str]) -> list[CoreOutput]:
        """See `EngineCore.abort`."""
        ended = []
        for request_id in request_ids:
            if (core := self._owner.pop(request_id, None)) is not None:
                ended += core.abort([request_id])
        return ended

    def has_work(self) -> bool:
        """See `EngineCore.has_work`."""
        return any(core.has_work() for core in self._cores)

    def step(self) -> list[CoreOutput]:
        """A step of each replica that has an answer; waits for one."""
        try:
            busy = [core for core in self._cores if _launch(core)]
            for core in self._cores:
                if core not in busy:
                    _ranks(core).check()
            outputs = [output for core in _answering(busy) for output in core.step()]
        except EngineDeadError:
            self._end()
            raise
        for output in outputs:
            if output.finish_reason is not None:
                self._owner.pop(output.request_id, None)
        return outputs

    def check(self) -> None:
        """See `RanksExecutor.check`."""
        try:
            for core in self._cores:
                _ranks(core).check()
        except EngineDeadError:
            self._end()
            raise

    def _end(self) -> None:
        for core in self._cores:
            _ranks(core).end()

    def reset_prefix_cache(self) -> bool:
        """See `EngineCore.reset_prefix_cache`."""
        done = [core.reset_prefix_cache() for core in self._cores]
        return all(done)

    @property
    def num_running(self) -> int:
        """Sequences of all replicas; so are the other numbers."""
        return sum(core.scheduler.num_running for core in self._cores)

    @property
    def num_waiting(self) -> int:
        """See `EngineStats`."""
        return sum(core.scheduler.num_waiting for core in self._cores)

    @property
    def num_preemptions(self) -> int:
        """See `EngineStats`."""
        return sum(core.scheduler.num_preemptions for core in self._cores)

    @property
    def num_queried(self) -> int:
        """See `EngineStats`."""
        return sum(core.kv.num_queried for core in self._cores)

    @property
    def num_hit(self) -> int:
        """See `EngineStats`."""
        return sum(core.kv.num_hit for core in self._cores)

    def usage(self) -> float:
        """The mean share of the pages in use."""
        return sum(core.kv.usage() for core in self._cores) / len(self._cores)


def _ranks(core: EngineCore) -> RanksExecutor:
    return cast("RanksExecutor", core.runner)


def _sequences(core: EngineCore) -> int:
    return core.scheduler.num_running + core.scheduler.num_waiting


def _launch(core: EngineCore) -> bool:
    """Launch what `core` has, and ask for its oldest step, if there is one."""
    oldest: Any = core.launch() if core.has_work() else None
    if oldest is not None:
        oldest.ask()
    return oldest is not None


def _answering(cores: list[EngineCore]) -> list[EngineCore]:
    """Those whose oldest step is done, of which there is one at least; none only if there are no cores."""
    by_fd = {_ranks(core).fileno(): core for core in cores}
    poll = select.poll()
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    ready: set[int] = set()
    while cores and not ready:
        ready = {fd for fd, _ in poll.poll(1000 * TICK)}
        for fd in by_fd.keys() - ready:  # also while others answer, who may do so for ever
            _ranks(by_fd[fd]).watch()
    return [by_fd[fd] for fd in by_fd if fd in ready]


def _sum(infos: list[EngineInfo]) -> EngineInfo:
    """What all have together; the first one's where it is no number of something."""
    names = ("num_blocks", "kv_bytes", "max_num_seqs", "weight_bytes")
    return replace(infos[0], **{name: sum(getattr(info, name) for info in infos) for name in names})
