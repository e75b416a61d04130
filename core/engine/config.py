"""Options, as a few small frozen dataclasses; each is read by one component. No torch here.

`EngineArgs` is what users set: one flat list of options with vLLM's names, shared by `LLM(...)`, the command line and
the server. `resolve` turns it into the parts once the model's own configuration is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class EngineArgs:
    """Every option of the engine. None leaves a choice to the model or the platform.

    Args:
        model: a folder with config.json and safetensors; None is the small model that ships with the engine.
        tokenizer: a folder with the tokenizer; None takes the model's.
        skip_tokenizer_init: no tokenizer; prompts and outputs are token ids.
        trust_remote_code: run Python code that comes with the checkpoint.
        dtype: ``"auto"`` (the checkpoint's, with fp32 kept as fp32), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        load_format: ``"auto"`` reads safetensors; ``"dummy"`` fills random weights, for measuring speed.
        hf_overrides: fields that replace those of config.json.
        seed: of dummy weights, and of requests that bring none.
        platform: the platform plugin's name; None takes the accelerator that is available.
        device_index: which device of the platform.
        max_model_len: most tokens of prompt and output together; None takes the model's limit, or what fits.
        max_num_seqs: most sequences in a step.
        max_num_batched_tokens: most tokens in a step; prompts beyond it are prefilled in chunks.
        scheduling_policy: ``"fcfs"``, or ``"priority"`` (lower numbers first).
        enable_prefix_caching: keep blocks of finished prompts for requests that begin alike.
        async_scheduling: schedule a step while the one before runs; None follows the platform.
        block_size: tokens in a KV block; None takes the platform's.
        kv_cache_dtype: ``"auto"`` is the model's dtype.
        gpu_memory_utilization: share of the device's memory that the engine may use, weights included.
        kv_cache_memory_bytes: KV memory in bytes; wins over the share.
        disable_log_stats: no progress or statistics lines.
    """

    model: str | None = None
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    dtype: str = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    platform: str | None = None
    device_index: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    enable_prefix_caching: bool = True
    async_scheduling: bool | None = None
    block_size: int | None = None
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    disable_log_stats: bool = False


@dataclass(frozen=True)
class SchedulerConfig:
    """What the scheduler reads.

    Attributes:
        max_num_seqs: rows of a step.
        max_num_batched_tokens: token budget of a step.
        max_model_len: most tokens of one sequence.
        policy: order of waiting requests and victims.
        prompt_logprobs_chunk: most prompt tokens a step computes for a sequence that wants prompt logprobs, since each
            needs a row of logits.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: Literal["fcfs", "priority"] = "fcfs"
    prompt_logprobs_chunk: int = 256


@dataclass(frozen=True)
class CacheConfig:
    """What the KV manager reads.

    Attributes:
        num_blocks: pages in the pool, page 0 (never used) included.
        enable_prefix_caching: keep full blocks for later hits.
    """

    num_blocks: int
    enable_prefix_caching: bool = True
