"""Whole steps as captured graphs: one for each shape that steps are padded to, made when a step first needs it.

    step -> shape -> known:  refresh the plans, replay           the host launches one thing
                     new:    run padded, capture for next time

A graph reads the step's arrays where `Staging` puts them, and leaves the logits in a buffer that all graphs share.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.batch import Batch, BatchBuilder, StepShape
from engine.config import SchedulerConfig
from engine.interfaces import AttentionBackend, AttentionBatch, Graph, GraphRuntime, Plan
from engine.staging import Staging
from engine.step import Step

log = logging.getLogger(__name__)

_MOST_MIXED_TOKENS = 2048  # beyond, only full steps are captured, which all have one size
_SHORTEST = 1024  # tokens of the smallest limit of sequences; the next ones are four times as long


@dataclass
class _Captured:
    graph: Graph
    moved: int  # of the staging at the capture
    groups: list[AttentionBatch]
    plans: list[Plan]


class StepGraphs:
    """Replays steps where a captured graph of their shape exists, and captures where none does.

    Args:
        runtime: the platform's.
        mixed: capture steps with prefills too, not only decodes.
        config: the limits of a step.
        staging, builder: make the batches.
        backends: (group, backend) of each plan that the model needs.
        forward: runs the model on a batch with its plans; gives logits [R, V].
    """

    def __init__(
        self,
        runtime: GraphRuntime,
        mixed: bool,
        config: SchedulerConfig,
        staging: Staging,
        builder: BatchBuilder,
        backends: Sequence[tuple[int, AttentionBackend]],
        forward: Callable[[Batch, Sequence[Plan]], Tensor],
    ) -> None:
        self._runtime, self._staging, self._builder = runtime, staging, builder
        self._backends, self._forward = backends, forward
        self._mixed, self._max_tokens = mixed, config.max_num_batched_tokens
        self._max_num_seqs, self._max_model_len = config.max_num_seqs, config.max_model_len
        self._captured: dict[StepShape, _Captured] = {}
        self._logits: Tensor | None = None
        self._fails = False

    def shape(self, step: Step) -> StepShape | None:
        """What to pad a step to; None for one that cannot or need not be captured, or wants logits of its prompts."""
        if self._fails:
            return None
        count, uniform = step.num_tokens, step.num_tokens == len(step.work)
        if not uniform and not (self._mixed and (count <= _MOST_MIXED_TOKENS or count == self._max_tokens)):
            return None
        if any(work.num_prompt_logits for work in step.work):
            return None
        longest, limit = max(work.start + work.num_tokens for work in step.work), _SHORTEST
        while limit < longest:
            limit *= 4
        tokens = count if count == self._max_tokens else _round_up(count if uniform else max(count, 16))
        requests = tokens if uniform else min(tokens, self._max_num_seqs)
        return StepShape(tokens, requests, min(limit, self._max_model_len), uniform)

    def run(self, shape: StepShape, batch: Batch) -> Tensor:
        """The logits [R, V] of a batch that was padded to `shape`, good until the next call."""
        known = self._captured.get(shape)
        if known is None or known.moved != self._staging.moved:
            self._capture(shape, batch)
        else:
            self._builder.select_tables(batch, known.groups)
            for (group, backend), plan in zip(self._backends, known.plans, strict=True):
                starts, lengths = batch.query_start.host, batch.seq_lens.host
                backend.refresh(plan, replace(known.groups[group], query_start_host=starts, seq_lens_host=lengths))
            known.graph.replay()
        assert self._logits is not None
        return self._logits[: shape.num_requests]

    def _capture(self, shape: StepShape, batch: Batch) -> None:
        groups = self._builder.attention(batch)
        plans = [backend.plan(groups[group]) for group, backend in self._backends]

        def launch() -> None:
            logits = self._forward(batch, plans)
            if self._logits is None or len(self._logits) < len(logits):
                most = max(_round_up(self._max_num_seqs), len(logits))
                self._logits = torch.empty(most, logits.shape[1], dtype=logits.dtype, device=logits.device)
                self._captured.clear()  # they write to the old one
            self._logits[: len(logits)].copy_(logits)

        launch()
        gc.disable()  # whatever is collected during a capture would give its memory back within it
        try:
            graph = self._runtime.capture(launch)
        except RuntimeError as error:  # some models' own code asks for values, which waits for the device
            self._fails = True
            log.warning("steps run without graphs, and slower, since they cannot be captured: %s", error)
        else:
            self._captured[shape] = _Captured(graph, self._staging.moved, groups, plans)
        finally:
            gc.enable()


def _round_up(count: int) -> int:
    """To the next of 1, 2, 3, 4, 6, 8, 12, ..., 64, 80, 96, 112, 128, 160, ...: padding costs less than more graphs."""
    power = 1 << (count - 1).bit_length()
    step = max(1, power // (4 if count <= 64 else 8))
    return -(-count // step) * step
