"""The runner: owns the model, the caches and the sampler on one device, and turns steps into tokens.

`launch` enqueues a step and returns at once on an asynchronous device; `InFlight.collect` waits for the sampled ids.
The next step's inputs come from the device itself, so a step may be launched before the one before it was collected.
"""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.batch import Batch, BatchBuilder, feed_sampled
from engine.compile import compile_layers
from engine.config import CacheConfig, EngineArgs, SchedulerConfig
from engine.errors import ConfigError, OutOfMemoryError
from engine.graphs import StepGraphs
from engine.info import EngineInfo
from engine.interfaces import AttentionBackend, Event, Plan, Platform
from engine.kv.pool import KVPlan, KVPool, plan_pool
from engine.logprobs import DeviceLogprobs
from engine.model import config as model_config
from engine.model.adapt import AdaptedModel, load_model
from engine.model.share import Share
from engine.plugins import get_hooks
from engine.request import CoreRequest
from engine.sampler import Sampled, Sampler, SamplingPlan
from engine.staging import Staging
from engine.step import Step, StepResult

log = logging.getLogger(__name__)

if not gc.isenabled():
    gc.freeze()  # a command begins: what there is so far are modules, and they stay

_DEFAULTS = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "block_size": 16}


@dataclass
class InFlight:
    """A launched step. What it gave is on its way to host memory, and there once `event` has passed."""

    runner: ModelRunner
    batch: Batch
    requests: list[CoreRequest]
    token_ids: Tensor
    logprobs: DeviceLogprobs | None
    prompt_logprobs: dict[int, DeviceLogprobs]
    event: Event
    settled: bool = False

    def settle(self) -> None:
        """Wait for the step and tell the sampler what it gave, once."""
        self.event.synchronize()
        for at, token in zip(() if self.settled else self.batch.sampled, self.token_ids.tolist(), strict=False):
            row = self.batch.work[at].row
            if self.runner.requests.get(row) is self.requests[at]:  # the row may have a new owner by now
                self.runner.sampler.append(row, token)
        self.settled = True

    def collect(self) -> StepResult:
        """Wait for the step and bring its tokens to the host, aligned with `Step.work`."""
        self.settle()
        batch, size = self.batch, len(self.batch.work)
        result = StepResult([None] * size, [None] * size, [None] * size)
        result.failed, self.runner.sampler.failed = self.runner.sampler.failed, []
        logprobs = self.logprobs.to_host() if self.logprobs else None
        for i, (at, token) in enumerate(zip(batch.sampled, self.token_ids.tolist(), strict=True)):
            result.token_ids[batch.order[at]] = token
            if logprobs:
                result.logprobs[batch.order[at]] = logprobs[i]
        for at, entries in self.prompt_logprobs.items():
            result.prompt_logprobs[batch.order[at]] = [e for e in entries.to_host() if e is not None]
        return result


class ModelRunner:
    """A model on one device.

    Attributes:
        args: the options, with what platform and plugins chose for those left open.
        kv_plan: how the cache's pages are cut.
        scheduler_config, cache_config: for the scheduler and the KV manager.
        overlap: whether launching a step before the last one is collected pays here.
        requests: which request owns each row.
        builder: makes the batches.
    """

    _begin: Any = None

    def __init__(
        self, args: EngineArgs, platform: Platform, share: Share | None = None, *, progress: bool = False
    ) -> None:
        platform.memory().release()  # of an engine that was dropped before, too
        self.platform, self._share, self.args = platform, share, args
        self._device = device = platform.device()
        device.activate()
        self.model: AdaptedModel = load_model(args, platform, share, begin=self._begin, progress=progress)
        assert args.max_num_seqs is not None
        assert args.max_num_batched_tokens is not None
        assert args.block_size is not None
        declared = platform.capabilities()
        layers = self.model.attention_layers.items()
        if not args.enforce_eager and (compiler := platform.compiler()) is not None:
            # Kernels are tuned for the size of the first step: small ones run as well with what large ones need.
            largest = functools.partial(self._dummy_step, args.max_num_batched_tokens or 1)
            compile_layers(self.model.model, self.model.attention_layers, compiler, largest)
        backends = {name: layer.backend for name, layer in layers if layer.shares_kv_with is None}
        self.kv_plan = plan_pool(backends, args.block_size, declared.block_sizes)
        num_blocks = args.num_blocks or self._affordable_blocks()
        if share is not None:
            num_blocks = share.least(num_blocks)
        max_len, self.min_blocks = _fit(self.kv_plan, num_blocks, args, self.model.max_model_len)
        limits = args.max_num_seqs, args.max_num_batched_tokens, max_len, args.scheduling_policy
        self.scheduler_config = SchedulerConfig(*limits, stages=args.pipeline_parallel_size)
        self.cache_config = CacheConfig(num_blocks, args.enable_prefix_caching)
        self.pool = KVPool(self.kv_plan, backends, platform, num_blocks)
        self._plans = self._bind()
        self._staging = Staging(device)
        self.builder = BatchBuilder(args.max_num_seqs, max_len, self.kv_plan.groups, self._staging, device.torch_device)
        eager = args.enforce_eager or declared.graphs == "none" or (share is not None and not share.capturable)
        runtime = None if eager else platform.graphs()
        mixed, config = declared.graphs == "full", self.scheduler_config
        parts = self._staging, self.builder, self._plans, self._forward
        self._graphs = runtime and StepGraphs(runtime, mixed, config, *parts)
        vocab_size, ops = self.model.vocab_size, platform.ops()
        self.sampler = Sampler(vocab_size, args.max_num_seqs, device.torch_device, ops, args.seed)
        self.sampler.grammars = get_hooks().engine_grammars(asdict(args), vocab_size)
        self._last: InFlight | None = None
        self._last_sampled = torch.zeros(args.max_num_seqs, dtype=torch.int64, device=device.torch_device)
        self.overlap = declared.asynchronous if args.async_scheduling is None else args.async_scheduling
        self.requests: dict[int, CoreRequest] = {}

    def _bind(self) -> list[tuple[int, AttentionBackend]]:
        """Give each layer its cache; returns the (group, backend) pairs that need a plan a step."""
        plans: list[tuple[int, AttentionBackend]] = []
        for index, group in enumerate(self.kv_plan.groups):
            for name in group.layers:
                layer = self.model.attention_layers[name]
                if (index, layer.backend) not in plans:
                    plans.append((index, layer.backend))
                layer.bind(self.pool.caches[name], plans.index((index, layer.backend)))
        return plans

    def _affordable_blocks(self) -> int:
        """Pages that fit into the memory that the options allow."""
        args, page = self.args, self.kv_plan.page_bytes
        if args.kv_cache_memory_bytes is not None:
            budget = args.kv_cache_memory_bytes
        else:
            memory = self.platform.memory()
            with memory.peak() as extra:
                self._dummy_step(args.max_num_batched_tokens or 1)
            memory.release()
            budget = memory.kv_budget(args.gpu_memory_utilization) - extra[0]
        if budget < 2 * page:
            raise OutOfMemoryError(
                f"{budget / 2**20:.1f} MiB are left for the KV cache, and it needs {2 * page / 2**20:.1f} at least; "
                "raise gpu_memory_utilization or kv_cache_memory_bytes, or lower max_num_batched_tokens"
            )
        return budget // page

    @torch.inference_mode()
    def _dummy_step(self, num_tokens: int) -> None:
        """Run the model on so many tokens, without a cache, as sampling from all rows would see it."""
        assert self.args.max_num_seqs is not None
        device = self._device.torch_device
        ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        positions = torch.arange(num_tokens, device=device) % (self.model.max_model_len or num_tokens)
        logits = self.model.forward(ids, positions, ids[: min(self.args.max_num_seqs, num_tokens)])
        logits.float().softmax(-1).cumsum(-1)  # what sampling holds at once, about
        self._device.synchronize()

    @torch.inference_mode()
    def launch(self, step: Step) -> InFlight:
        """Enqueue a step."""
        for row in step.freed_rows:
            self.sampler.release(row)
            del self.requests[row]
        for new in step.new_rows:
            self.sampler.admit(new.row, new.request, new.token_ids)
            self.requests[new.row] = new.request
        shape = self._graphs.shape(step) if self._graphs else None
        self.builder.apply(step)
        self._staging.begin(self.builder.nbytes(step, shape) + self.sampler.nbytes(len(step.work)))
        batch = self.builder.build(step, shape)
        self.builder.stage_tables()
        rows = [batch.work[i].row for i in batch.sampled]
        ends = [batch.work[i].start + batch.work[i].num_tokens for i in batch.sampled]
        # Where the last step's ids are needed, the device gets this one's forward pass before the host waits for them.
        late = self._last if self._last and not self._last.settled and self.sampler.waits(rows) else None
        plan = None if late else self.sampler.plan(rows, ends, self._staging)
        self._staging.upload()
        self.builder.update_tables()
        if shape and self._graphs:
            logits = self._graphs.run(shape, batch)
        else:
            groups = self.builder.attention(batch)
            logits = self._forward(batch, [backend.plan(groups[group]) for group, backend in self._plans])
        if plan is None:
            assert late is not None
            late.settle()
            plan = self.sampler.plan(rows, ends, self._staging)
            self._staging.upload()
        self._last = self._finish(batch, logits, plan)
        return self._last

    def _finish(self, batch: Batch, logits: Tensor, plan: SamplingPlan) -> InFlight:
        """Enqueue what becomes of the logits [S + P, V]."""
        sampled = self.sampler.sample(logits[: len(batch.sampled)], plan)
        if self._share is not None:
            sampled.token_ids = self._share.same(sampled.token_ids)
        self._last_sampled.index_copy_(0, batch.sampled_rows.device, sampled.token_ids)
        prompt = self._prompt_logprobs(batch, logits[len(batch.sampled) :])
        return self._send(batch, sampled, prompt)

    def _forward(self, batch: Batch, plans: Sequence[Plan]) -> Tensor:
        """Logits [S + P, V] of a batch that has been uploaded."""
        self.model.context.set_plans(plans)
        ids = feed_sampled(batch.input_ids.device, batch.feed.device, self._last_sampled)
        return self.model.forward(ids, batch.positions.device, batch.logits_index.device)

    def _prompt_logprobs(self, batch: Batch, logits: Tensor) -> dict[int, DeviceLogprobs]:
        """Of each work that wants them, by its index in the batch."""
        found: dict[int, DeviceLogprobs] = {}
        begin = 0
        for at, work in enumerate(batch.work):
            if work.num_prompt_logits and batch.prompt_next is not None:
                end = begin + work.num_prompt_logits
                wanted = self.requests[work.row].params.prompt_logprobs or 0
                found[at] = self.sampler.prompt_logprobs(logits[begin:end], batch.prompt_next.device[begin:end], wanted)
                begin = end
        return found

    def _send(self, batch: Batch, sampled: Sampled, prompt: dict[int, DeviceLogprobs]) -> InFlight:
        """Start the copies to the host, and mark their end."""
        host = self._device.host_buffer(tuple(sampled.token_ids.shape), torch.int64)
        host.copy_(sampled.token_ids, non_blocking=True)
        for logprobs in (sampled.logprobs, *prompt.values()):
            if logprobs is not None:
                logprobs.start_copy(self._device)
        event = self._device.event()
        event.record()
        requests = [self.requests[w.row] for w in batch.work]
        return InFlight(self, batch, requests, host, sampled.logprobs, prompt, event)

    def info(self, load_seconds: float) -> EngineInfo:
        """What front-ends need to know."""
        model, folder = self.model, self.args.folder
        first = self.kv_plan.groups[0].spec.block_size if self.kv_plan.groups else 0
        return EngineInfo(
            model=str(folder),
            architecture=type(model.model).__name__,
            platform=self.platform.name,
            device=str(self._device.torch_device),
            dtype=str(model.model.dtype).removeprefix("torch."),
            vocab_size=model.vocab_size,
            max_model_len=self.scheduler_config.max_model_len,
            eos_token_ids=model_config.eos_token_ids(folder, model.config),
            default_sampling_params=_sampling_defaults(model_config.generation_defaults(folder)),
            num_blocks=self.cache_config.num_blocks,
            block_size=first,
            kv_bytes=self.pool.nbytes,
            min_blocks=self.min_blocks,
            max_num_seqs=self.scheduler_config.max_num_seqs,
            max_num_batched_tokens=self.scheduler_config.max_num_batched_tokens,
            weight_bytes=sum(p.nbytes for p in model.model.parameters()),
            load_seconds=load_seconds,
        )


def resolve(args: EngineArgs, platform: Platform, plugin_defaults: dict[str, Any]) -> EngineArgs:
    """Fill options left open: from plugins first, then the platform, then our own defaults.

    Raises `ConfigError` with the platform's reason for an option that cannot work there.
    """
    args = replace(args, **plugin_defaults)
    options = asdict(args)
    patch = platform.configure(options)
    if patch.refusals:
        reasons = (f"{name}={options[name]!r} on {platform.name}: {why}" for name, why in patch.refusals.items())
        raise ConfigError("; ".join(reasons))
    for source, values in ((platform.name, patch.defaults), ("engine", _DEFAULTS)):
        chosen: dict[str, Any] = {k: v for k, v in values.items() if getattr(args, k) is None}
        if chosen:
            log.debug("%s chose %s", source, chosen)
            args = replace(args, **chosen)
    return args


def _fit(plan: KVPlan, num_blocks: int, args: EngineArgs, model_limit: int | None) -> tuple[int, int]:
    """`max_model_len`, and the pages that one sequence of it needs."""
    assert args.max_num_batched_tokens

    def pages(length: int) -> int:
        return 1 + sum(g.spec.max_blocks(length, args.max_num_batched_tokens or 1) for g in plan.groups)

    asked = args.max_model_len or model_limit or 2**31
    if args.max_model_len and model_limit and args.max_model_len > model_limit:
        raise ConfigError(
            f"max_model_len {args.max_model_len} is beyond the model's limit of {model_limit}; lower it, or change the "
            "limit with hf_overrides if the model allows"
        )
    if pages(asked) <= num_blocks:
        return asked, pages(asked)
    if args.max_model_len:
        raise ConfigError(
            f"max_model_len {asked} needs {pages(asked)} KV pages ({pages(asked) * plan.page_bytes / 2**20:.1f} MiB) "
            f"for one sequence, and there are {num_blocks}; lower max_model_len, or raise num_blocks, "
            "kv_cache_memory_bytes or gpu_memory_utilization"
        )
    low, high = 0, asked  # pages(low) fits, pages(high) does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if pages(middle) <= num_blocks else (low, middle)
    if low < 2:
        raise ConfigError(f"{num_blocks} KV pages do not hold two tokens; raise num_blocks or kv_cache_memory_bytes")
    log.warning("max_model_len is %d, not the model's %s: the KV cache has %d pages", low, model_limit, num_blocks)
    return low, pages(low)


def _sampling_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json in the names of `SamplingParams`; greedy when it says not to sample."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    found = {n: generation[n] for n in names if generation.get(n) is not None}
    return found if generation.get("do_sample", True) else {"temperature": 0.0}
