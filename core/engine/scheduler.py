"""Decides what each step computes. There are no phases: every sequence's computed tokens catch up with its tokens.

    num_computed          len(token_ids)     num_tokens
    v                     v                  v
    | to compute: next    | sampled in steps | - - - - - - - >  max_len
                          | in flight, ids   |
                          | not yet known    |

Running sequences come first, then waiting ones, each in order of (priority,) arrival. Where blocks run short the last
running sequence gives up its own and waits again, to be recomputed; it comes before all that arrived later. A waiting
sequence never takes the row or the blocks of a running one, not even of one with a lower priority: it takes the next
that come free. No torch here.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from engine.config import SchedulerConfig
from engine.errors import RequestError
from engine.kv.manager import BlockTable, KVCacheManager
from engine.request import CoreOutput, CoreRequest, FinishReason
from engine.step import NewRow, Step, StepResult, Work


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request on its way.

    Attributes:
        request: as it was added.
        order: position among others, lower first; unique.
        token_ids: prompt and output known so far.
        max_len: prompt and output end here.
        stops: token ids that end it, with the stop reason that each gives.
        wanted_logits: leading prompt positions whose logits are wanted.
        table: its blocks.
        num_tokens: known and in flight.
        num_computed: tokens computed once the steps in flight are done.
        num_logits: of `wanted_logits`, those that steps have been asked for.
        row: while it runs.
    """

    request: CoreRequest
    order: tuple[int, float, int]
    token_ids: list[int]
    max_len: int
    stops: dict[int, int | None]
    wanted_logits: int
    table: BlockTable
    num_tokens: int
    num_computed: int = 0
    num_logits: int = 0
    row: int | None = None
    finished: bool = False
    num_cached: int = 0
    num_preemptions: int = 0
    scheduled_time: float | None = None

    @property
    def in_flight(self) -> bool:
        """Whether tokens were sampled whose ids are not known yet."""
        return self.num_tokens > len(self.token_ids)

    def output(self, token_ids: list[int]) -> CoreOutput:
        """What a step brought."""
        return CoreOutput(
            self.request.request_id,
            token_ids,
            num_cached_tokens=self.num_cached,
            num_preemptions=self.num_preemptions,
            scheduled_time=self.scheduled_time,
        )


_ORDER = attrgetter("order")


@dataclass
class _Plan:
    """A step in the making."""

    step: Step
    budget: int
    sequences: list[_Sequence] = field(default_factory=list)


class Scheduler:
    """Owns all sequences of one engine core. Pure host code: the same calls give the same steps.

    `schedule` may be called again before `update` of the steps before, to any depth; `update` takes results in order
    of steps, in which the device runs them. With several `stages` no step waits for a token of one under way.

    Attributes:
        num_preemptions: so far.
    """

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager) -> None:
        self._config = config
        self._kv = kv
        self._sequences: dict[str, _Sequence] = {}
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._free_rows = list(range(config.max_num_seqs))
        self._freed_rows: list[int] = []
        self._in_flight: deque[tuple[Step, list[_Sequence]]] = deque()
        self._num_added = 0
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        """Sequences that own a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a row, preempted ones included."""
        return len(self._waiting)

    def has_work(self) -> bool:
        """Whether any sequence has not finished, or any step awaits its `update`."""
        return bool(self._sequences or self._in_flight)

    def add(self, request: CoreRequest) -> None:
        """Queue a request; once accepted, it finishes. Raises `RequestError` where it could never run."""
        params, prompt = request.params, request.prompt_token_ids
        limit = self._config.max_model_len
        if request.request_id in self._sequences:
            raise RequestError(
                f"request id {request.request_id!r} is in use; ids must be unique among running requests"
            )
        if not prompt:
            raise RequestError("the prompt has no tokens; give at least one")
        if len(prompt) >= limit:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, and max_model_len is {limit} with the output's first token "
                "counted in; shorten the prompt or raise max_model_len"
            )
        max_len = limit if params.max_tokens is None else min(limit, len(prompt) + params.max_tokens)
        # the last token is never computed
        needed = self._kv.max_blocks(max_len - 1, self._config.max_num_batched_tokens)
        if needed > (usable := self._kv.allocator.num_usable):
            raise RequestError(
                f"the request needs {needed} KV blocks at its full length of {max_len} tokens, and there are {usable}; "
                "lower max_tokens, shorten the prompt, or give the KV cache more memory"
            )
        token_ids = list(prompt)
        stops: dict[int, int | None] = {token: token for token in params.stop_token_ids or ()}
        if not params.ignore_eos:
            stops.update(dict.fromkeys(request.eos_token_ids))
        seq = _Sequence(
            request=request,
            order=(request.priority if self._config.policy == "priority" else 0, request.arrival, self._num_added),
            token_ids=token_ids,
            max_len=max_len,
            stops=stops,
            wanted_logits=0 if params.prompt_logprobs is None else len(prompt) - 1,
            table=self._kv.open(token_ids, request.cache_salt),
            num_tokens=len(prompt),
        )
        self._num_added += 1
        self._sequences[request.request_id] = seq
        insort(self._waiting, seq, key=_ORDER)

    def abort(self, request_ids: Iterable[str]) -> list[CoreOutput]:
        """End these sequences now, with one last output each; unknown and finished ids are ignored."""
        outputs = []
        for request_id in request_ids:
            if seq := self._sequences.get(request_id):
                outputs.append(seq.output([]))
                outputs[-1].finish_reason = "abort"
                self._finish(seq)
        return outputs

    def schedule(self) -> Step | None:
        """The next step, or None when nothing can be computed before the next `update` or `add`."""
        plan = _Plan(Step(freed_rows=self._freed_rows), self._config.max_num_batched_tokens)
        self._continue_running(plan)
        self._admit_waiting(plan)
        if not plan.sequences:
            return None
        self._freed_rows = []
        self._in_flight.append((plan.step, plan.sequences))
        return plan.step

    def update(self, step: Step, result: StepResult) -> list[CoreOutput]:
        """Take the results of the oldest step in flight; outputs of the sequences for which it brought something.

        Tokens sampled after a sequence's end, while that was not known yet, are dropped.
        """
        expected, sequences = self._in_flight.popleft()
        assert step is expected, "steps are updated in the order in which they were scheduled"
        outputs = []
        pooleds = result.pooled or [None] * len(sequences)
        for seq, token, logprobs, prompt_logprobs, pooled in zip(
            sequences, result.token_ids, result.logprobs, result.prompt_logprobs, pooleds, strict=True
        ):
            if seq.finished or (token is None and not prompt_logprobs and pooled is None):
                continue
            output = seq.output([] if token is None else [token])
            output.prompt_logprobs, output.pooled = prompt_logprobs, pooled
            if pooled is not None:
                output.finish_reason = "stop"
                self._finish(seq)
            if token is not None:
                seq.token_ids.append(token)
                output.logprobs = None if logprobs is None else [logprobs]
                output.finish_reason, output.stop_reason = self._end(seq, token)
                if output.finish_reason:
                    self._finish(seq)
            outputs.append(output)
        return outputs

    def _continue_running(self, plan: _Plan) -> None:
        """Work for running sequences, in order, so that those preempted have none in this step yet."""
        i = 0
        while i < (size := len(self._running)) and plan.budget and len(plan.sequences) * self._config.stages < size:
            seq = self._running[i]
            i += 1
            num_tokens = self._num_computable(seq, seq.num_computed, plan.budget)
            if num_tokens and (new_blocks := self._reserve(seq, seq.num_computed + num_tokens)) is not None:
                self._compute(plan, seq, num_tokens, new_blocks)

    def _reserve(self, seq: _Sequence, num_tokens: int) -> list[list[int]] | None:
        """Blocks up to `num_tokens`, at the cost of later sequences; None when `seq` itself is the one to yield."""
        while (new_blocks := self._kv.reserve(seq.table, seq.num_computed, num_tokens)) is None:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is seq:
                assert self._running, "add() refuses what does not fit alone"
                return None
        return new_blocks

    def _admit_waiting(self, plan: _Plan) -> None:
        """Rows for waiting sequences, in order: nobody overtakes one that has to wait, so none starves."""
        size = min(len(self._running) + len(self._waiting), self._config.max_num_seqs)
        while self._waiting and plan.budget and self._free_rows and len(plan.sequences) * self._config.stages < size:
            seq, num_running = self._waiting[0], len(self._running)
            if seq.in_flight or not self._kv.has_room(num_running + 1):
                return
            # a prompt token whose logits are still wanted must be computed
            limit = seq.num_tokens - 1 if seq.num_logits == seq.wanted_logits else seq.num_logits
            prefix = self._kv.match(seq.table, limit)
            num_tokens = self._num_computable(seq, prefix.num_tokens, plan.budget)
            if not num_tokens or not self._kv.admit(seq.table, prefix, prefix.num_tokens + num_tokens, num_running):
                return
            self._waiting.pop(0)
            insort(self._running, seq, key=_ORDER)
            seq.row = heapq.heappop(self._free_rows)
            seq.num_computed = prefix.num_tokens
            if seq.scheduled_time is None:
                seq.scheduled_time = time.monotonic()
                seq.num_cached = prefix.num_tokens
            blocks = [list(ids) for ids in seq.table.blocks]
            plan.step.new_rows.append(NewRow(seq.row, seq.request, list(seq.token_ids), seq.num_computed, blocks))
            self._compute(plan, seq, num_tokens, [[] for _ in blocks])

    def _num_computable(self, seq: _Sequence, start: int, budget: int) -> int:
        """Tokens from `start` on that the next step may compute."""
        if seq.num_tokens == seq.max_len or (seq.in_flight and self._config.stages > 1):
            return 0
        num_tokens = min(seq.num_tokens - start, budget)
        if self._config.whole_prompts and start + num_tokens < seq.num_tokens:
            return 0
        if seq.num_logits < seq.wanted_logits:
            if start < seq.num_logits:  # recomputed after a preemption: up to where the logits are still wanted
                return min(num_tokens, seq.num_logits - start)
            return min(num_tokens, self._config.prompt_logprobs_chunk)
        return num_tokens

    def _compute(self, plan: _Plan, seq: _Sequence, num_tokens: int, new_blocks: list[list[int]]) -> None:
        """Add the sequence's next `num_tokens` tokens to the step."""
        assert seq.row is not None
        start = seq.num_computed
        seq.num_computed = end = start + num_tokens
        sample = end == seq.num_tokens
        seq.num_tokens += sample
        num_logits = 0
        if start == seq.num_logits < seq.wanted_logits:
            num_logits = min(end, seq.wanted_logits) - start
            seq.num_logits += num_logits
        plan.step.work.append(Work(seq.row, start, num_tokens, new_blocks, sample, num_logits))
        plan.sequences.append(seq)
        plan.budget -= num_tokens

    def _end(self, seq: _Sequence, token: int) -> tuple[FinishReason | None, int | None]:
        """Whether the newest token ends the sequence, and why."""
        num_output = len(seq.token_ids) - len(seq.request.prompt_token_ids)
        params = seq.request.params  # a form that is complete ends before `min_tokens`, too
        if token in seq.stops and (num_output > params.min_tokens or params.structured_outputs):
            return "stop", seq.stops[token]
        return ("length" if len(seq.token_ids) == seq.max_len else None), None

    def _preempt(self, seq: _Sequence) -> None:
        self._leave(seq)
        seq.num_computed = 0
        seq.num_preemptions += 1
        self.num_preemptions += 1
        insort(self._waiting, seq, key=_ORDER)

    def _finish(self, seq: _Sequence) -> None:
        if seq.row is not None:
            self._leave(seq)
        else:
            _remove(self._waiting, seq)
        seq.finished = True
        del self._sequences[seq.request.request_id]

    def _leave(self, seq: _Sequence) -> None:
        """Give up row and blocks; steps in flight may still write to both, before any later step does."""
        assert seq.row is not None
        _remove(self._running, seq)
        self._kv.release(seq.table, seq.num_computed)
        heapq.heappush(self._free_rows, seq.row)
        self._freed_rows.append(seq.row)
        seq.row = None


def _remove(sequences: list[_Sequence], seq: _Sequence) -> None:
    """Take `seq` out of a list sorted by order."""
    i = bisect_left(sequences, seq.order, key=_ORDER)
    assert sequences[i] is seq
    del sequences[i]
