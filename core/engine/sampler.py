"""From logits to tokens: what each row's `SamplingParams` ask for, in vLLM's order.

    logits -> bias, bad and too-early stop tokens -> custom processors -> allowed tokens, penalties -> grammars -> draw

A request's tokens depend on its logits, its seed and the position only: not on its row, its neighbours or preemptions.
S is the rows of a step, R those with a history, V the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import RequestError
from engine.interfaces import DrawInputs, OpSet
from engine.logprobs import DeviceLogprobs
from engine.philox import uniform
from engine.request import CoreRequest, LogitsProcessor, SamplingParams
from engine.staging import Staged, Staging

_ROW = np.dtype(
    [
        ("ints", np.int64, 3),  # top_k, top_p, cut, as `DrawInputs` has them
        ("scale", np.float32),
        ("seed", np.uint64),
        ("penalties", np.float32, 3),  # repetition, frequency, presence
        ("stop_from", np.int64),  # position from which stop tokens may be produced
        ("logprobs", np.int64),  # how many; -1 is none
        ("slot", np.int64),  # in the history; -1 is none
    ]
)
_IDLE = np.array(((1, 0, 0), 1, 0, (1, 0, 0), 0, -1, -1), _ROW)
_FP32 = np.finfo(np.float32)


@dataclass
class Sampled:
    """What a step gave, on the device: token ids int64 [S], and log probabilities where asked for."""

    token_ids: Tensor
    logprobs: DeviceLogprobs | None = None


@dataclass
class SamplingPlan:
    """A step's sampling as the host prepared it; its device arrays are good after `Staging.upload`."""

    num_rows: int  # S
    draw: DrawInputs | None = None  # None if all rows are greedy
    added: tuple[Staged, Staged] | None = None  # int64, indices into the flat logits; fp32, what is added there
    processors: list[tuple[int, _Edits]] = field(default_factory=list)  # index
    grammars: Callable[[Tensor], None] | None = None
    new: list[tuple[int, int]] = field(default_factory=list)  # slots whose history starts, and with what everywhere
    past: tuple[Staged, Staged] | None = None  # int64, indices into the flat history; int32, what is added there
    history: tuple[Staged, Staged] | None = None  # int64 [2, R], index and slot; fp32 [3, R], penalties
    wanted: tuple[Staged, list[int]] | None = None  # int64, indices of rows that want log probabilities; how many each


@dataclass
class _Edits:
    """What a row does to its logits by itself; few rows have any."""

    bias: dict[int, float]
    stops: list[int]  # not before `min_tokens`
    bad: list[list[int]]  # sequences that must not be completed
    processors: list[LogitsProcessor]
    grammar: Any  # the state of one, as `engine.hooks.engine_grammars` has it; None if the output is free
    output: list[int]  # kept only if it `waits`
    waits: bool  # the next token depends on ids that the host must know

    def added(self, early: bool) -> Iterator[tuple[int, float]]:
        """Token ids, and what is added to their logits."""
        yield from self.bias.items()
        early = early and not (self.grammar and self.grammar.ended)
        banned = [*(self.stops if early else ()), *(i[-1] for i in self.bad if self._ends_with(i[:-1]))]
        yield from ((token, -math.inf) for token in banned)

    def _ends_with(self, ids: list[int]) -> bool:
        return not ids or self.output[-len(ids) :] == ids


class Sampler:
    """Chooses tokens. A row is one running sequence, from `admit` to `release`.

    Args:
        vocab_size: V, the width of the logits. Ids outside that a request names are ignored.
        max_rows: rows are 0 to this, exclusive.
        device: where the logits are.
        ops: the platform's.
        seed: of requests that bring none.

    Attributes:
        grammars: as `engine.hooks.engine_grammars` has it, where a plugin does.
        failed: ids of requests whose grammar cannot go on.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device, ops: OpSet, seed: int = 0) -> None:
        self.vocab_size, self._ops, self._default_seed = vocab_size, ops, seed
        self.grammars: Any = None
        self.failed: list[str] = []
        self._rows = np.full(max_rows, _IDLE)
        self._edits: dict[int, _Edits] = {}
        self._past: dict[int, tuple[int, NDArray[np.int64], NDArray[np.int32]]] = {}  # for the next plan to write
        self._history = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._free: list[int] = []

    def admit(self, row: int, request: CoreRequest, token_ids: list[int]) -> None:
        """A sequence enters `row`, at first or after a preemption; `token_ids` is prompt and output so far."""
        self.release(row)
        params, num_prompt = request.params, len(request.prompt_token_ids)
        seed = (self._default_seed if params.seed is None else params.seed) % (1 << 64)
        penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        wanted = -1 if params.logprobs is None else self._num_logprobs(params.logprobs)
        slot = -1
        if params.allowed_token_ids is not None or penalties != (1, 0, 0):
            slot = self._free.pop() if self._free else self._grow()
            self._past[row] = self._past_of(slot, token_ids, num_prompt, params.allowed_token_ids)
        self._rows[row] = (*self._draw_inputs(params), seed, penalties, num_prompt + params.min_tokens, wanted, slot)
        bias = {i: params.logit_bias[i] for i in self._known(params.logit_bias)} if params.logit_bias else {}
        stops = self._known((*request.eos_token_ids, *(params.stop_token_ids or ()))) if params.min_tokens else []
        bad = [ids for ids in request.bad_token_ids if ids and self._known(ids) == ids]
        processors = list(params.logits_processors or ())
        output = token_ids[num_prompt:]
        grammar = self.grammars.start(request, output) if params.structured_outputs else None
        waits = bool(processors or grammar) or any(len(ids) > 1 for ids in bad)
        if bias or stops or bad or waits:
            self._edits[row] = _Edits(bias, stops, bad, processors, grammar, output, waits)

    def release(self, row: int) -> None:
        """The sequence in `row`, if there is one, is gone."""
        if (slot := int(self._rows[row]["slot"])) >= 0:
            self._free.append(slot)
        self._rows[row] = _IDLE
        self._edits.pop(row, None)
        self._past.pop(row, None)

    def append(self, row: int, token_id: int) -> None:
        """`row` produced `token_id`. Those that wait need it, before the next `plan`."""
        edits = self._edits.get(row)
        if edits and edits.waits:
            edits.output.append(token_id)
            if edits.grammar and not edits.grammar.accept(token_id):
                self.failed.append(edits.grammar.request_id)

    def waits(self, rows: Iterable[int]) -> bool:
        """Whether a `plan` of these rows needs all that they produced before: bad words, processors and grammars do."""
        return any((edits := self._edits.get(row)) and edits.waits for row in rows)

    def _draw_inputs(self, params: SamplingParams) -> tuple[tuple[int, int, int], float]:
        """top_k, top_p and cut; scale."""
        if params.greedy:
            return (1, DrawInputs.ONE, DrawInputs.LAST), 1.0
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        cut = -math.log2(max(params.min_p, 2.0**-64)) * DrawInputs.LEVELS
        scale = DrawInputs.LEVELS * math.log2(math.e) / max(params.temperature, float(_FP32.tiny))
        ints = top_k, round(params.top_p * DrawInputs.ONE), int(min(cut, DrawInputs.LAST))
        return ints, min(max(scale, float(_FP32.tiny)), float(_FP32.max))

    def _num_logprobs(self, asked: int) -> int:
        return self.vocab_size if asked == -1 else min(asked, self.vocab_size)

    def _known(self, ids: Iterable[int]) -> list[int]:
        return [i for i in ids if 0 <= i < self.vocab_size]

    def _past_of(
        self, slot: int, token_ids: list[int], num_prompt: int, allowed: list[int] | None
    ) -> tuple[int, NDArray[np.int64], NDArray[np.int32]]:
        """A sequence's history from scratch: what it is everywhere, and what is added where in the flat history."""
        start, unique = 0 if allowed is None else OpSet.BANNED, set(self._known(allowed or ()))
        groups = set(self._known(token_ids[:num_prompt])), self._known(token_ids[num_prompt:]), unique
        values = np.repeat(np.array([OpSet.PROMPT, 1, OpSet.BANNED], np.int32), [len(ids) for ids in groups])
        index = np.array([i for ids in groups for i in ids], np.int64)
        return start, slot * self.vocab_size + index, values  # banned twice is allowed

    def _grow(self) -> int:
        """Double the history, which has slots only for rows that need one, and return a free slot."""
        old, size = self._history, len(self._history)
        self._history = old.new_zeros(min(max(4, 2 * size), len(self._rows)), self.vocab_size)
        self._history[:size] = old
        self._free = list(range(size, len(self._history)))
        return self._free.pop()

    def nbytes(self, num_rows: int) -> int:
        """At most this many bytes are staged by a `plan` of `num_rows` rows."""
        added = sum(len(e.bias) + len(e.stops) + len(e.bad) for e in self._edits.values())
        grammars = sum(bool(e.grammar) for e in self._edits.values()) * (self.vocab_size // 8 + 80)
        return grammars + 80 * num_rows + 12 * (added + sum(len(index) for _, index, _ in self._past.values()))

    def plan(self, rows: list[int], positions: list[int], staging: Staging) -> SamplingPlan:
        """Stage what `sample` needs on the device; the `upload` of `staging`, which is begun, must come before that.

        For each row of the logits, `rows` has the row of its sequence and `positions` the index of the new token there.
        """
        plan = SamplingPlan(len(rows))
        row, position = self._rows[rows], np.array(positions, np.int64)
        if (row["ints"][:, 0] > 1).any():
            top_k, top_p, cut = row["ints"].T
            max_top_k = int(top_k[(top_k > 1) & (top_k < self.vocab_size)].max(initial=0))
            ints = staging.add(np.stack((top_k, top_p, cut, uniform(row["seed"], position)))).device
            limits = max_top_k, bool((top_p < DrawInputs.ONE).any()), bool((cut < DrawInputs.LAST).any())
            plan.draw = DrawInputs(ints[0], ints[1], ints[2], ints[3], staging.add(row["scale"]).device, *limits)
        if self._edits:
            self._plan_edits(plan, rows, position < row["stop_from"], staging)
        if self._past:
            starts, where, values = zip(*self._past.values(), strict=True)
            plan.new = list(zip(self._rows[list(self._past)]["slot"].tolist(), starts, strict=True))
            plan.past, self._past = (staging.add(np.concatenate(where)), staging.add(np.concatenate(values))), {}
        if (index := np.flatnonzero(row["slot"] >= 0)).size:
            places = staging.add(np.stack((index, row["slot"][index])))
            plan.history = places, staging.add(row["penalties"][index].T)
        if (index := np.flatnonzero(row["logprobs"] >= 0)).size:
            plan.wanted = staging.add(index), row["logprobs"][index].tolist()
        return plan

    def _plan_edits(self, plan: SamplingPlan, rows: list[int], early: NDArray[np.bool_], staging: Staging) -> None:
        added: list[tuple[int, float]] = []
        grammars: dict[int, Any] = {}
        for i, row in enumerate(rows):
            if edits := self._edits.get(row):
                added += [(i * self.vocab_size + token, value) for token, value in edits.added(bool(early[i]))]
                if edits.processors:
                    plan.processors.append((i, edits))
                if edits.grammar:
                    grammars[i] = edits.grammar
        plan.grammars = self.grammars.plan(grammars, staging) if grammars else None
        if added:
            index, values = zip(*added, strict=True)
            plan.added = staging.add(np.array(index, np.int64)), staging.add(np.array(values, np.float32))

    def sample(self, logits: Tensor, plan: SamplingPlan) -> Sampled:
        """Choose a token for each row of `logits` [S, V], of any float dtype; they are not changed.

        Nothing waits for the device, custom processors apart. A row that is no distribution gives a token all the same,
        and always the same one: the first NaN, else the first of the largest logits; 0 if all are masked.
        """
        assert logits.shape == (plan.num_rows, self.vocab_size)
        for slot, start in plan.new:
            self._history[slot].fill_(start)
        if plan.past is not None:
            self._history.view(-1).index_add_(0, plan.past[0].device, plan.past[1].device)
        token_ids = self._ops.draw(self._edit(logits, plan), plan.draw)
        if plan.history is not None:
            index, slots = plan.history[0].device
            flat = slots * self.vocab_size + token_ids[index]
            self._history.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        if plan.wanted is None:
            return Sampled(token_ids)
        (staged, counts), ids = plan.wanted, token_ids[plan.wanted[0].device]
        packed = self._ops.logprobs(logits[staged.device], ids, max(counts))
        return Sampled(token_ids, DeviceLogprobs(packed, counts, staged.host.tolist(), plan.num_rows))

    def prompt_logprobs(self, logits: Tensor, next_token_ids: Tensor, num: int) -> DeviceLogprobs:
        """Log probabilities of `next_token_ids`, int64 [P], which follow the prompt positions of `logits` [P, V].

        `num` is how many likeliest tokens come besides; -1 for all.
        """
        size, num = len(logits), self._num_logprobs(num)
        return DeviceLogprobs(self._ops.logprobs(logits, next_token_ids, num), [num] * size, list(range(size)), size)

    def _edit(self, logits: Tensor, plan: SamplingPlan) -> Tensor:
        """Masks, bias, processors and penalties: fp32 [S, V], or `logits` itself where there are none."""
        if not (plan.added or plan.processors or plan.history or plan.grammars):
            return logits
        x = logits.to(torch.float32, copy=True)
        if plan.added is not None:
            x.view(-1).index_add_(0, plan.added[0].device, plan.added[1].device)
        for i, edits in plan.processors:
            for processor in edits.processors:
                changed = processor(edits.output, x[i])
                if not isinstance(changed, Tensor) or changed.shape != x[i].shape:
                    raise RequestError(f"a logits processor must return logits of its row's shape, got {changed!r}")
                x[i] = changed
        if plan.history is not None:
            self._ops.penalise(x, self._history, plan.history[0].device, plan.history[1].device)
        if plan.grammars is not None:
            plan.grammars(x)
        return x
