"""The engine core: scheduler and runner joined into a loop over token ids.

    while core.has_work():
        for output in core.step(): ...

With overlap, `step` launches step n + 1 before it collects step n, so the device never waits for the host.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict

from engine.config import EngineArgs
from engine.info import EngineStats
from engine.kv.manager import KVCacheManager
from engine.plugins import get_hooks, load_platform
from engine.request import CoreOutput, CoreRequest
from engine.runner import InFlight, ModelRunner, resolve
from engine.scheduler import Scheduler
from engine.step import Step


class EngineCore:
    """Runs sequences of token ids. Not thread-safe: one thread adds, aborts and steps."""

    def __init__(self, args: EngineArgs, *, progress: bool = False) -> None:
        begin = time.monotonic()
        self._hooks = get_hooks()
        platform = load_platform(args.platform, args.device_index)
        args = resolve(args, platform, self._hooks.engine_config_defaults(asdict(args)))
        self.runner = ModelRunner(args, platform, progress=progress)
        self.kv = KVCacheManager(self.runner.kv_plan.groups, self.runner.cache_config)
        self.scheduler = Scheduler(self.runner.scheduler_config, self.kv)
        self._depth = 2 if self.runner.overlap else 1
        self._in_flight: deque[tuple[Step, InFlight]] = deque()
        self.info = self.runner.info(load_seconds=time.monotonic() - begin)

    def add(self, request: CoreRequest) -> None:
        """Queue a sequence; raises `RequestError` with the numbers when it can never run."""
        self.scheduler.add(request)

    def abort(self, request_ids: Iterable[str]) -> list[CoreOutput]:
        """End sequences now; unknown ids are ignored, since the sequence may just have finished."""
        return self.scheduler.abort(request_ids)

    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return bool(self._in_flight) or self.scheduler.has_work()

    def step(self) -> list[CoreOutput]:
        """Launch what can be launched, collect the oldest step, and return what it brought."""
        while len(self._in_flight) < self._depth and (step := self.scheduler.schedule()) is not None:
            self._in_flight.append((step, self.runner.launch(step)))
        if not self._in_flight:
            return []
        step, handle = self._in_flight.popleft()
        outputs = self.scheduler.update(step, handle.collect())
        self._hooks.engine_stats(self._stats(step, outputs))
        return outputs

    def reset_prefix_cache(self) -> bool:
        """Forget cached prompts; false when running sequences hold blocks, which then stay."""
        return self.kv.reset_prefix_cache()

    def _stats(self, step: Step, outputs: list[CoreOutput]) -> EngineStats:
        return EngineStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            kv_usage=self.kv.usage(),
            prefix_queries=self.kv.num_queried,
            prefix_hits=self.kv.num_hit,
            num_preemptions=self.scheduler.num_preemptions,
            prompt_tokens=sum(w.num_tokens for w in step.work if w.num_tokens > 1 or not w.sample),
            generation_tokens=sum(len(o.token_ids) for o in outputs),
        )
