"""Options, as a few small frozen dataclasses; each is read by one component. No torch here.

`EngineArgs` is what users set: one flat list of options with vLLM's names, shared by `LLM(...)`, the command line and
the server. The runner derives the other parts once model and platform are known.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.errors import ConfigError

DEMO_MODEL = Path(__file__).with_name("demo_model")
"""The small model that ships with the engine."""

_AT_LEAST_ONE = (
    *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes", "num_blocks"),
    *(f"{how}_parallel_size" for how in ("tensor", "pipeline", "data", "decode_context")),
    "distributed_timeout_seconds",
)


@dataclass(frozen=True)
class EngineArgs:
    """Every option of the engine. None leaves a choice to the model or the platform.

    Args:
        model: a folder with config.json and safetensors; None is the small model that ships with the engine.
        tokenizer: a folder with the tokenizer; None takes the model's.
        tokenizer_mode: how it is read: ``"auto"`` as Transformers does, or a word that a plugin brings.
        skip_tokenizer_init: no tokenizer; prompts and outputs are token ids.
        trust_remote_code: run Python code that comes with the checkpoint.
        dtype: ``"auto"`` (the checkpoint's, with fp32 kept as fp32), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        quantization: ``"int8"`` or ``"int4"`` rounds linear layers while loading; stored formats need no word.
        load_format: ``"auto"`` maps safetensors, ``"copy"`` reads them, ``"dummy"`` is random; plugins may have others.
        hf_overrides: fields that replace those of config.json.
        runner: ``"generate"``, or ``"pooling"`` for embeddings, scores and classes; ``"auto"`` follows the checkpoint.
        pooler_config: how a model pools, where the checkpoint does not say, or otherwise; see the guide to pooling.
        seed: of dummy weights, and of requests that bring none.
        platform: the platform plugin's name; None takes the accelerator that is available.
        device_index: which device of the platform; of several ranks, the first one's.
        tensor_parallel_size: ranks that split each layer of the model.
        pipeline_parallel_size: stages of successive layers, each of as many ranks, that a step passes through.
        decode_context_parallel_size: of the ranks that split layers, so many hold each sequence's keys between them.
        data_parallel_size: replicas of the engine, with so many ranks each; requests go to the least busy.
        enable_expert_parallel: the ranks that split layers have whole experts each, and tokens travel.
        distributed_executor_backend: what runs several ranks: ``"mp"``, the default, on this machine, or ``"ray"``.
        ray_address: of the cluster that ``"ray"`` joins; None takes ``RAY_ADDRESS``, or this machine's, or starts one.
        distributed_timeout_seconds: without progress of any rank, a run ends after these, and names who is behind.
        max_model_len: most tokens of prompt and output together; None takes the model's limit, or what fits.
        max_num_seqs: most sequences in a step.
        max_num_batched_tokens: most tokens in a step; prompts beyond it are prefilled in chunks.
        scheduling_policy: ``"fcfs"``, or ``"priority"`` (lower numbers first).
        enable_prefix_caching: keep blocks of finished prompts for requests that begin alike.
        async_scheduling: schedule a step while the one before runs; None follows the platform.
        enforce_eager: neither compile the model nor capture graphs, where the platform would.
        block_size: tokens in a KV block; None takes the platform's.
        kv_cache_dtype: ``"auto"`` is the model's; ``"fp8"``, in the platform's own format, halves that of 16 bits.
        gpu_memory_utilization: share of the device's memory that the engine may use, weights included.
        kv_cache_memory_bytes: KV memory in bytes; wins over the share.
        num_blocks: KV memory in pages; wins over both.
        disable_log_stats: no progress or statistics lines.
    """

    model: str | None = None
    tokenizer: str | None = None
    tokenizer_mode: str = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: str | None = None
    load_format: str = "auto"
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    runner: Literal["auto", "generate", "pooling"] = "auto"
    pooler_config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    platform: str | None = None
    device_index: int = 0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    distributed_executor_backend: str | None = None
    ray_address: str | None = None
    distributed_timeout_seconds: float = 300.0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    enable_prefix_caching: bool = True
    async_scheduling: bool | None = None
    enforce_eager: bool = False
    block_size: int | None = None
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_blocks: int | None = None
    disable_log_stats: bool = False

    @property
    def world_size(self) -> int:
        """Ranks of a replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return Path(self.model) if self.model else DEMO_MODEL

    @classmethod
    def of(cls, **options: Any) -> EngineArgs:
        """Check names, types and ranges; raises `ConfigError` that names the option and what it may be."""
        known = {f.name: f for f in fields(cls)}
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known)}"
                raise ConfigError(f"unknown option {name!r}{hint}")
        args = cls(**options)
        try:
            msgspec.convert(dataclasses.asdict(args), cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"bad option: {error}") from error
        for name in _AT_LEAST_ONE:
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 < args.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {args.gpu_memory_utilization}")
        if args.device_index < 0:
            raise ConfigError(f"device_index must be at least 0, got {args.device_index}")
        if args.ray_address and args.distributed_executor_backend != "ray":
            raise ConfigError("ray_address is Ray's alone; add distributed_executor_backend='ray'")
        return args


@dataclass(frozen=True)
class SchedulerConfig:
    """What the scheduler reads."""

    max_num_seqs: int  # rows of a step
    max_num_batched_tokens: int  # token budget of a step
    max_model_len: int  # most tokens of one sequence
    policy: Literal["fcfs", "priority"] = "fcfs"  # order of waiting requests and victims
    # most prompt tokens a step computes for a sequence that wants prompt logprobs, since each needs a row of logits
    prompt_logprobs_chunk: int = 256
    whole_prompts: bool = False  # a prompt is computed in one step, for models whose tokens see later ones
    stages: int = 1  # steps that are under way at once, each with a share of the sequences


@dataclass(frozen=True)
class CacheConfig:
    """What the KV manager reads."""

    num_blocks: int  # pages in the pool, page 0 (never used) included
    enable_prefix_caching: bool = True  # keep full blocks for later hits
