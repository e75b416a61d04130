"""The engine core: scheduler and runner joined into a loop over token ids.

    while core.has_work():
        for output in core.step(): ...

With overlap, `step` launches step n + 1 before it collects step n, so the device never waits for the host.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, cast

from engine.config import CacheConfig, EngineArgs, SchedulerConfig
from engine.discovery import RUNNERS, discover
from engine.errors import RequestError
from engine.info import EngineInfo, EngineStats
from engine.interfaces import Platform
from engine.kv.manager import KVCacheManager
from engine.kv.pool import KVPlan
from engine.model.share import Share
from engine.plugins import Hooks, get_hooks, load_platform, pick
from engine.request import CoreOutput, CoreRequest
from engine.scheduler import Scheduler
from engine.step import Step, StepResult

if TYPE_CHECKING:
    from engine.runner import ModelRunner


class Launched(Protocol):
    """A step that was launched; see `engine.runner.InFlight`."""

    def collect(self) -> StepResult: ...  # noqa: D102


class Executor(Protocol):
    """What runs steps: a `ModelRunner` in this process, or what stands for one on each of several ranks."""

    kv_plan: KVPlan
    cache_config: CacheConfig
    scheduler_config: SchedulerConfig
    overlap: bool

    def launch(self, step: Step) -> Launched:
        """See `ModelRunner.launch`."""

    def info(self, load_seconds: float) -> EngineInfo:
        """See `ModelRunner.info`."""


def _executor(args: EngineArgs, hooks: Hooks, progress: bool) -> Executor:
    several = args.world_size > 1 or args.enable_expert_parallel or args.decode_context_parallel_size > 1
    if args.distributed_executor_backend or several:
        executors = {name: make for name, make in hooks.engine_executors().items() if name != "replicas"}
        make = pick("distributed_executor_backend", args.distributed_executor_backend or "mp", executors)
        return cast("Executor", make(args, progress=progress))
    return make_runner(args, progress=progress)


def make_runner(
    args: EngineArgs, share: Callable[[Platform], tuple[Platform, Share]] | None = None, *, progress: bool = False
) -> ModelRunner:
    """The runner in this process: of the whole model, or of a `share` of it on the platform as that share sees it."""
    platform = load_platform(args.platform, args.device_index)
    source = get_hooks().engine_load_formats().get(args.load_format)
    platform.memory().expect(getattr(source, "nbytes", lambda args: 0)(args) // args.world_size)
    from engine.runner import ModelRunner, resolve  # Transformers' modules take seconds, which the platform may use

    platform, mine = share(platform) if share else (platform, None)
    args = resolve(args, platform, get_hooks().engine_config_defaults(asdict(args)))
    kinds: list[Any] = [kind for plugin in discover(RUNNERS) if (kind := cast(Any, plugin.load())).claims(args)]
    return cast(ModelRunner, (kinds or [ModelRunner])[0](args, platform, mine, progress=progress))


def make_core(args: EngineArgs, *, progress: bool = False) -> EngineCore:
    """An `EngineCore`, or what stands for several replicas of one with `data_parallel_size`."""
    if args.data_parallel_size == 1:
        return EngineCore(args, progress=progress)
    make = pick("distributed_executor_backend", "replicas", get_hooks().engine_executors())
    return cast("EngineCore", make(args, progress=progress))


class EngineCore:
    """Runs sequences of token ids. Not thread-safe: one thread adds, aborts and steps."""

    def __init__(self, args: EngineArgs, *, progress: bool = False) -> None:
        begin = time.monotonic()
        self._hooks = get_hooks()
        self.runner = _executor(args, self._hooks, progress)
        self.kv = KVCacheManager(self.runner.kv_plan.groups, self.runner.cache_config)
        self.scheduler = Scheduler(self.runner.scheduler_config, self.kv)
        self._depth = max(self.runner.scheduler_config.stages, 2 if self.runner.overlap else 1)
        self._in_flight: deque[tuple[Step, Launched]] = deque()
        self.info = self.runner.info(load_seconds=time.monotonic() - begin)
        self._grammars = self._hooks.engine_grammars(asdict(args), self.info.vocab_size)

    def add(self, request: CoreRequest) -> None:
        """Queue a sequence; raises `RequestError` with the reason when it can never run. Waits for `prepare`."""
        if request.params.logits_processors and not hasattr(self.runner, "sampler"):
            raise RequestError("logits_processors are Python functions, which cannot reach the processes of ranks")
        if preparing := self.prepare(request):
            preparing.result()
        self.scheduler.add(request)

    def prepare(self, request: CoreRequest) -> Future[None] | None:
        """What makes `add` quick, done on another thread; None where it is quick already."""
        if request.params.structured_outputs and not self._grammars:
            raise RequestError("structured_outputs needs a plugin that answers engine_grammars, and there is none")
        return cast("Future[None] | None", request.params.structured_outputs and self._grammars.prepare(request))

    def abort(self, request_ids: Iterable[str]) -> list[CoreOutput]:
        """End sequences now; unknown ids are ignored, since the sequence may just have finished."""
        return self.scheduler.abort(request_ids)

    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return bool(self._in_flight) or self.scheduler.has_work()

    def step(self) -> list[CoreOutput]:
        """Launch what can be launched, collect the oldest step, and return what it brought."""
        if not self.launch():
            return []
        step, handle = self._in_flight.popleft()
        result = handle.collect()
        outputs = self.scheduler.abort(result.failed) + self.scheduler.update(step, result)
        self._hooks.engine_stats(self._stats(step, outputs))
        return outputs

    def launch(self) -> Launched | None:
        """Launch what can be launched; the oldest step that is under way, which the next call of `step` collects."""
        while len(self._in_flight) < self._depth and (step := self.scheduler.schedule()) is not None:
            self._in_flight.append((step, self.runner.launch(step)))
        return self._in_flight[0][1] if self._in_flight else None

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
