"""What the core tells of itself: once when it is ready, and a snapshot while it runs. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class EngineInfo:
    """What a front-end needs to know of a core that is ready.

    Attributes:
        model: the folder.
        architecture: the model's class in Transformers.
        platform, device: where it runs.
        dtype: of weights and activations.
        vocab_size: rows of logits; token ids are below it.
        max_model_len: most tokens of prompt and output.
        eos_token_ids: ids that end an output.
        default_sampling_params: from the model's generation_config.json, in `SamplingParams`' names.
        num_blocks, block_size, kv_bytes: the KV cache: pages, tokens in a block of the first group, bytes.
        min_blocks: pages that one sequence of `max_model_len` tokens needs, the null page included.
        max_num_seqs, max_num_batched_tokens: limits of a step.
        weight_bytes: of the parameters.
        load_seconds: from start to ready.
        pooling: what a model that does not generate serves, ``"tasks"`` above all; empty for one that generates.
    """

    model: str
    architecture: str
    platform: str
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    default_sampling_params: dict[str, Any]
    num_blocks: int
    block_size: int
    kv_bytes: int
    min_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    weight_bytes: int
    load_seconds: float
    pooling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineStats:
    """A snapshot, handed to `engine_stats` hooks after each step.

    Attributes:
        num_running, num_waiting: sequences.
        kv_usage: share of the pages in use, 0 to 1.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found, so far.
        num_preemptions: so far.
        prompt_tokens, generation_tokens: of the last step: computed for prompts, and produced.
    """

    num_running: int
    num_waiting: int
    kv_usage: float
    prefix_queries: int
    prefix_hits: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
