"""The runner of models that pool: steps as ever, and at their end results in place of sampled tokens.

A request's states are collected over its steps, since a prompt may be prefilled in chunks. Where the result needs all
of them, it takes nothing from the prefix cache. Nothing is preempted: running prompts take a step's tokens first, so at
most one is unfinished, and no other then takes the pages that were free for it when it was admitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.config import EngineArgs
from engine.errors import ConfigError
from engine.extensions.pooling import checkpoint, offline
from engine.extensions.pooling.model import PoolingModel, begin
from engine.extensions.pooling.outputs import pack
from engine.info import EngineInfo
from engine.interfaces import Platform
from engine.model.share import Share
from engine.request import CoreRequest
from engine.runner import InFlight, ModelRunner
from engine.sampler import Sampler, SamplingPlan
from engine.staging import Staging
from engine.step import StepResult
from engine.text import load_tokenizer


@dataclass
class Pooled(InFlight):
    """A launched step whose results, one after the other in `token_ids`, are float32.

    Attributes:
        found: of each result, the index of its work in the batch, and its shape.
    """

    found: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def settle(self) -> None:
        """Wait for the step."""
        self.event.synchronize()
        self.settled = True

    def collect(self) -> StepResult:
        """Wait for the step and bring its results, aligned with `Step.work`."""
        self.settle()
        size, data, begin = len(self.batch.work), self.token_ids.numpy().tobytes(), 0
        result = StepResult([None] * size, [None] * size, [None] * size, pooled=[None] * size)
        for at, shape in self.found:
            end = begin + 4 * int(np.prod(shape))
            result.pooled[self.batch.order[at]] = pack(shape, data[begin:end])
            begin = end
        return result


class PoolingRunner(ModelRunner):
    """A model that pools, on one device."""

    _begin = staticmethod(begin)
    claims = staticmethod(checkpoint.claims)
    embed = staticmethod(offline.embed)
    encode = staticmethod(offline.encode)
    classify = staticmethod(offline.classify)
    score = staticmethod(offline.score)
    rerank = staticmethod(offline.rerank)
    reward = staticmethod(offline.reward)

    def __init__(
        self, args: EngineArgs, platform: Platform, share: Share | None = None, *, progress: bool = False
    ) -> None:
        super().__init__(args, platform, share, progress=progress)
        self._pooling = cast(PoolingModel, self.model)
        self._pooling.ready(self._answers(args))
        whole, config = self._pooling.sees_ahead, self.scheduler_config
        length, budget = config.max_model_len, config.max_num_batched_tokens
        if whole:
            # A step holds the longest prompt. What a token sees is no prefix of anything, and sizes hardly repeat.
            if args.max_model_len is None and self.model.max_model_len is None:
                length = min(length, budget)
            budget = max(budget, length)
            self.cache_config = replace(self.cache_config, enable_prefix_caching=False)
            self._graphs = None
        # A request has a last token that is never made; states of prompts cost no row of logits.
        self.scheduler_config = replace(
            config,
            max_model_len=length + 1,
            max_num_batched_tokens=budget,
            prompt_logprobs_chunk=budget,
            whole_prompts=whole,
        )
        self.sampler = _NoSampler(self._pooling, args.max_num_seqs or 1, budget, platform)
        self._parts: dict[int, list[Tensor]] = {}

    def _answers(self, args: EngineArgs) -> list[int]:
        words = self._pooling.recipe.tokens
        if words is None:
            return []
        tokenizer = load_tokenizer(
            args.tokenizer or str(args.folder), args.tokenizer_mode, trust=args.trust_remote_code
        )
        found = [tokenizer.encode(word, add_special_tokens=False) for word in words]
        if any(len(ids) != 1 for ids in found):
            raise ConfigError(f"classifier_from_token needs words of one token each; {words} have {found}")
        return [ids[0] for ids in found]

    def _finish(self, batch: Batch, logits: Tensor, plan: SamplingPlan) -> InFlight:
        """Collect the states [S + P, E], and make results of those that are complete."""
        requests = [self.requests[work.row] for work in batch.work]
        last = {at: logits[i : i + 1] for i, at in enumerate(batch.sampled)}
        begin, done, asked, states = len(batch.sampled), list[int](), list[dict[str, Any]](), list[Tensor]()
        for at, (work, request) in enumerate(zip(batch.work, requests, strict=True)):
            if work.start == 0:
                self._parts.pop(work.row, None)  # of one that was aborted
            if work.num_prompt_logits:
                self._parts.setdefault(work.row, []).append(logits[begin : begin + work.num_prompt_logits])
                begin += work.num_prompt_logits
            if at in last:
                done.append(at)
                asked.append(request.pooling or {})
                states.append(torch.cat([*self._parts.pop(work.row, []), last[at]]))
                assert request.params.prompt_logprobs is None or len(states[-1]) == len(request.prompt_token_ids)
        made = self._pooling.make(asked, states) if done else []
        flat = torch.cat([x.reshape(-1) for x in made]) if made else logits.new_zeros(0, dtype=torch.float32)
        host = self._device.host_buffer(tuple(flat.shape), torch.float32)
        host.copy_(flat, non_blocking=True)
        event = self._device.event()
        event.record()
        found = [(at, tuple(x.shape)) for at, x in zip(done, made, strict=True)]
        return Pooled(self, batch, requests, host, None, {}, event, found=found)

    def info(self, load_seconds: float) -> EngineInfo:
        """As of other runners; `EngineInfo.pooling` has what the model serves."""
        info = super().info(load_seconds)
        return replace(info, max_model_len=info.max_model_len - 1, pooling=self._pooling.describe())


class _NoSampler(Sampler):
    """Stands where others sample, and stages what a pair's tokens are: 0 of its first text, 1 of its second."""

    def __init__(self, model: PoolingModel, max_rows: int, max_tokens: int, platform: Platform) -> None:
        super().__init__(1, max_rows, platform.device().torch_device, platform.ops())
        self._model, self._max_tokens = model, max_tokens
        self._seconds: dict[int, int] = {}  # of a row, where its second text begins

    def admit(self, row: int, request: CoreRequest, token_ids: list[int]) -> None:
        """A sequence enters `row`."""
        self._seconds.pop(row, None)
        if (second := (request.pooling or {}).get("second")) is not None:
            self._seconds[row] = second

    def release(self, row: int) -> None:
        """It is gone."""
        self._seconds.pop(row, None)

    def nbytes(self, num_rows: int) -> int:
        """A type a token, if any text has a second."""
        return 8 * self._max_tokens if self._seconds else 0

    def plan(self, rows: list[int], positions: list[int], staging: Staging) -> SamplingPlan:
        """Stage the types; prompts of models that know them are whole, so rows and ends tell all of the step."""
        self._model.token_types = None
        if self._seconds:
            types = [np.arange(end) >= self._seconds.get(row, end) for row, end in zip(rows, positions, strict=True)]
            self._model.token_types = staging.add(np.concatenate(types).astype(np.int64))
        return SamplingPlan(len(rows))

    def waits(self, rows: Sequence[int]) -> bool:  # type: ignore[override]
        """Never: nothing follows from what came before."""
        return False
