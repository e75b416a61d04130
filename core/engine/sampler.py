"""From logits to tokens: what each row's `SamplingParams` ask for, in vLLM's order.

    logits -> allowed, bad and too-early stop tokens -> bias -> custom processors -> penalties -> greedy: argmax
                                                          `-> temperature -> min_p -> top_k -> top_p -> draw

A request's tokens depend on its logits, its seed and the position only: not on its row, its neighbours or preemptions.
S is the rows of a step, R those of a group, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.draw import UNIT_BITS, Filters, draw_among, draw_from_all, uniform
from engine.errors import RequestError
from engine.logprobs import DeviceLogprobs, pack_logprobs
from engine.request import CoreRequest, LogitsProcessor, SamplingParams
from engine.staging import Staged, Staging

_GREEDY, _AMONG, _ALL = 0, 1, 2  # how a row is drawn; `_ALL` with the flags of the filters that it uses
_TOP_K, _TOP_P = 4, 8
_AMONG_K = 1024  # up to here the k likeliest are looked up; beyond, the whole vocabulary is filtered in place
_FP32 = np.finfo(np.float32)

_PROMPT = 1 << 30  # a token's history: its count in the output, this flag, and negative if it is not allowed
_COUNT = _PROMPT - 1
_BANNED = -(1 << 31)


@dataclass
class Sampled:
    """What a step gave, on the device: token ids int64 [S], and log probabilities where asked for."""

    token_ids: Tensor
    logprobs: DeviceLogprobs | None = None


@dataclass
class _Group:
    """Rows that are drawn in one way."""

    kind: int
    ints: Staged  # int64 [4, R]: index in the step, uniform number, top_k, top_p
    floats: Staged  # fp32 [2, R]: temperature, min_p
    max_k: int  # the largest top_k
    min_p: bool  # whether a row has one


@dataclass
class SamplingPlan:
    """A step's sampling as the host prepared it; its device arrays are good after `Staging.upload`."""

    num_rows: int  # S
    groups: list[_Group] = field(default_factory=list)  # the rows that are not greedy
    bans: Staged | None = None  # int64, indices into the flat logits that become -inf
    bias: tuple[Staged, Staged] | None = None  # the same, and what is added there
    processors: list[tuple[int, list[LogitsProcessor], list[int]]] = field(default_factory=list)  # index, ..., output
    history: tuple[Staged, Staged] | None = None  # int64 [2, R], index and slot; fp32 [3, R], penalties
    banned: bool = False  # whether a row has allowed ids
    repetition: bool = False  # whether a row has a repetition penalty
    additive: bool = False  # whether a row has one of the other two
    wanted: Staged | None = None  # int64, indices of rows that want log probabilities
    wanted_counts: list[int] = field(default_factory=list)  # how many each


@dataclass
class _Edits:
    """What a row changes in its logits, beside penalties; few rows have any."""

    stops: list[int]  # not before `min_tokens`
    bias: dict[int, float]
    bad: list[list[int]]  # sequences that must not be completed
    processors: list[LogitsProcessor]
    output: list[int]  # kept only for `bad` and `processors`


class Sampler:
    """Chooses tokens. A row is one running sequence, from `admit` to `release`.

    Args:
        vocab_size: V, the width of the logits. Ids outside that a request names are ignored.
        max_rows: rows are 0 to this, exclusive.
        device: where the logits are.
        seed: of requests that bring none.
        rows_at_once: work on so many rows together. Many keep an accelerator busy, at about 50 bytes for each of their
            logits; few stay in a host's caches. The results are the same.
    """

    def __init__(
        self, vocab_size: int, max_rows: int, device: torch.device, seed: int = 0, rows_at_once: int = 64
    ) -> None:
        self.vocab_size, self._default_seed, self._rows_at_once = vocab_size, seed, rows_at_once
        self._kind = np.zeros(max_rows, np.int64)
        self._tops = np.zeros((2, max_rows), np.int64)  # top_k, top_p
        self._floats = np.zeros((2, max_rows), np.float32)  # temperature, min_p
        self._penalties = np.zeros((3, max_rows), np.float32)  # repetition, frequency, presence
        self._seeds = np.zeros(max_rows, np.uint64)
        self._stop_from = np.zeros(max_rows, np.int64)  # position from which stop tokens may be produced
        self._wanted = np.full(max_rows, -1, np.int64)  # log probabilities; -1 is none
        self._slot = np.full(max_rows, -1, np.int64)  # in the history
        self._banned = np.zeros(max_rows, np.bool_)
        self._edits: dict[int, _Edits] = {}
        self._history = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._free: list[int] = []

    def admit(self, row: int, request: CoreRequest, token_ids: list[int]) -> None:
        """A sequence enters `row`, for the first time or after a preemption; `token_ids` is prompt and output so far.

        Waits for the device only if the request has penalties or `allowed_token_ids`.
        """
        self.release(row)
        params, num_prompt = request.params, len(request.prompt_token_ids)
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        self._kind[row] = self._kind_of(params, top_k)
        self._tops[:, row] = top_k, round(params.top_p * (1 << UNIT_BITS))
        self._floats[:, row] = np.clip(params.temperature, _FP32.tiny, _FP32.max), params.min_p
        self._penalties[:, row] = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        self._seeds[row] = (self._default_seed if params.seed is None else params.seed) % (1 << 64)
        self._stop_from[row] = num_prompt + params.min_tokens
        if params.logprobs is not None:
            self._wanted[row] = self._num_logprobs(params.logprobs)
        stops = self._known((*request.eos_token_ids, *(params.stop_token_ids or ()))) if params.min_tokens else []
        bias = {i: params.logit_bias[i] for i in self._known(params.logit_bias)} if params.logit_bias else {}
        bad = [ids for ids in request.bad_token_ids if ids and self._known(ids) == ids]
        processors = list(params.logits_processors or ())
        if stops or bias or bad or processors:
            self._edits[row] = _Edits(stops, bias, bad, processors, token_ids[num_prompt:] if bad or processors else [])
        if params.allowed_token_ids is not None or (self._penalties[:, row] != (1, 0, 0)).any():
            self._slot[row] = slot = self._free.pop() if self._free else self._grow()
            self._history[slot] = torch.from_numpy(self._past(token_ids, num_prompt, params.allowed_token_ids))
            self._banned[row] = params.allowed_token_ids is not None

    def release(self, row: int) -> None:
        """The sequence in `row`, if there is one, is gone."""
        if self._slot[row] >= 0:
            self._free.append(int(self._slot[row]))
        self._slot[row] = self._wanted[row] = -1
        self._edits.pop(row, None)

    def append(self, row: int, token_id: int) -> None:
        """`row` produced `token_id`. Only bad words and custom processors need it, before the next `plan`."""
        edits = self._edits.get(row)
        if edits and (edits.bad or edits.processors):
            edits.output.append(token_id)

    def _kind_of(self, params: SamplingParams, top_k: int) -> int:
        if params.greedy or top_k == 1:
            return _GREEDY
        if top_k <= min(_AMONG_K, self.vocab_size - 1):
            return _AMONG
        return _ALL | (_TOP_K if top_k < self.vocab_size else 0) | (_TOP_P if params.top_p < 1 else 0)

    def _num_logprobs(self, asked: int) -> int:
        return self.vocab_size if asked == -1 else min(asked, self.vocab_size)

    def _known(self, ids: Iterable[int]) -> list[int]:
        return [i for i in ids if 0 <= i < self.vocab_size]

    def _past(self, token_ids: list[int], num_prompt: int, allowed: list[int] | None) -> NDArray[np.int32]:
        """A sequence's history [V], from scratch."""
        past = np.bincount(self._known(token_ids[num_prompt:]), minlength=self.vocab_size).astype(np.int32)
        past[self._known(token_ids[:num_prompt])] |= _PROMPT
        if allowed is not None:
            past[np.delete(np.arange(self.vocab_size), self._known(allowed))] |= _BANNED
        return past

    def _grow(self) -> int:
        """Double the history, which has slots only for rows that need one, and return a free slot."""
        old, size = self._history, len(self._history)
        self._history = old.new_zeros(min(max(4, 2 * size), len(self._slot)), self.vocab_size)
        self._history[:size] = old
        self._free = list(range(size, len(self._history)))
        return self._free.pop()

    def nbytes(self, num_rows: int) -> int:
        """At most this many bytes are staged by a `plan` of `num_rows` rows."""
        edits = self._edits.values()
        return 80 * num_rows + sum(8 * (len(e.stops) + len(e.bad)) + 12 * len(e.bias) for e in edits)

    def plan(self, rows: list[int], positions: list[int], staging: Staging) -> SamplingPlan:
        """Stage what `sample` needs on the device; the `upload` of `staging`, which is begun, must come before that.

        For each row of the logits, `rows` has the row of its sequence and `positions` the index of the new token there.
        """
        plan = SamplingPlan(len(rows))
        row, position = np.array(rows, np.int64), np.array(positions, np.int64)
        kinds = self._kind[row]
        for kind in set(kinds[kinds != _GREEDY].tolist()):
            index = np.flatnonzero(kinds == kind)
            of = row[index]
            tops, floats = self._tops[:, of], self._floats[:, of]
            ints = np.stack((index, uniform(self._seeds[of], position[index]), *tops))
            max_k, min_p = int(tops[0].max()), bool(floats[1].any())
            plan.groups.append(_Group(kind, staging.add(ints), staging.add(floats), max_k, min_p))
        if self._edits:
            self._plan_edits(plan, rows, position < self._stop_from[row], staging)
        index = np.flatnonzero(self._slot[row] >= 0)
        if index.size:
            of = row[index]
            penalties = self._penalties[:, of]
            plan.history = staging.add(np.stack((index, self._slot[of]))), staging.add(penalties)
            plan.banned = bool(self._banned[of].any())
            plan.repetition, plan.additive = bool((penalties[0] != 1).any()), bool(penalties[1:].any())
        index = np.flatnonzero(self._wanted[row] >= 0)
        if index.size:
            plan.wanted, plan.wanted_counts = staging.add(index), self._wanted[row[index]].tolist()
        return plan

    def _plan_edits(self, plan: SamplingPlan, rows: list[int], early: NDArray[np.bool_], staging: Staging) -> None:
        bans: list[int] = []
        bias: dict[int, float] = {}
        for i, row in enumerate(rows):
            if edits := self._edits.get(row):
                start = i * self.vocab_size
                bans += [start + token for token in edits.stops if early[i]]
                bans += [start + ids[-1] for ids in edits.bad if _ends_with(edits.output, ids[:-1])]
                bias |= {start + token: value for token, value in edits.bias.items()}
                if edits.processors:
                    plan.processors.append((i, edits.processors, edits.output))
        if bans:
            plan.bans = staging.add(np.array(bans, np.int64))
        if bias:
            values = np.array(list(bias.values()), np.float32)
            plan.bias = staging.add(np.array(list(bias), np.int64)), staging.add(values)

    def sample(self, logits: Tensor, plan: SamplingPlan) -> Sampled:
        """Choose a token for each row of `logits` [S, V], of any float dtype; they are not changed.

        Nothing waits for the device, custom processors apart. A row that is no distribution gives a token all the same,
        and always the same one: the first NaN, else the first of the largest logits; 0 if all are masked.
        """
        assert logits.shape == (plan.num_rows, self.vocab_size)
        x = self._edit(logits, plan)
        best, token_ids = x.max(-1)
        for group in plan.groups:
            num_rows = group.ints.device.shape[1]
            for part in self._parts(num_rows):
                index = group.ints.device[0, part]
                chosen = self._draw(x[part] if num_rows == plan.num_rows else x[index], group, part)
                token_ids[index] = torch.where(best[index].isfinite(), chosen, token_ids[index])
        if plan.history is not None:
            index, slots = plan.history[0].device
            flat = slots * self.vocab_size + token_ids[index]
            self._history.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        if plan.wanted is None:
            return Sampled(token_ids)
        index, counts = plan.wanted.device, plan.wanted_counts
        packed = pack_logprobs(logits[index], token_ids[index], max(counts))
        return Sampled(token_ids, DeviceLogprobs(packed, counts, plan.wanted.host.tolist(), plan.num_rows))

    def prompt_logprobs(self, logits: Tensor, next_token_ids: Tensor, num: int) -> DeviceLogprobs:
        """Log probabilities of `next_token_ids`, int64 [P], which follow the prompt positions of `logits` [P, V].

        `num` is how many likeliest tokens come besides; -1 for all.
        """
        size, num = len(logits), self._num_logprobs(num)
        return DeviceLogprobs(pack_logprobs(logits, next_token_ids, num), [num] * size, list(range(size)), size)

    @staticmethod
    def _draw(x: Tensor, group: _Group, part: slice) -> Tensor:
        filters = Filters(*group.ints.device[1:, part, None], *group.floats.device[:, part, None])
        if group.kind == _AMONG:
            return draw_among(x.float(), filters, group.max_k)
        use_k, use_p = bool(group.kind & _TOP_K), bool(group.kind & _TOP_P)
        return draw_from_all(x.float(), filters, min_p=group.min_p, top_k=use_k, top_p=use_p)

    def _edit(self, logits: Tensor, plan: SamplingPlan) -> Tensor:
        """Masks, bias, processors and penalties: fp32 [S, V], or `logits` itself where there are none."""
        if not (plan.bans or plan.bias or plan.processors or plan.history):
            return logits
        x = logits.to(torch.float32, copy=True)
        if plan.history is not None and plan.banned:
            index, slots = plan.history[0].device
            for part in self._parts(len(index)):
                x[index[part]] = x[index[part]].masked_fill_(self._history[slots[part]] < 0, -torch.inf)
        if plan.bans is not None:
            x.view(-1).index_fill_(0, plan.bans.device, -torch.inf)
        if plan.bias is not None:
            x.view(-1).index_add_(0, plan.bias[0].device, plan.bias[1].device)
        for i, processors, output in plan.processors:
            for processor in processors:
                changed = processor(output, x[i])
                if not isinstance(changed, Tensor) or changed.shape != x[i].shape:
                    raise RequestError(f"a logits processor must return logits of its row's shape, got {changed!r}")
                x[i] = changed
        if plan.history is not None and (plan.repetition or plan.additive):
            self._penalise(x, plan, *plan.history)
        return x

    def _penalise(self, x: Tensor, plan: SamplingPlan, places: Staged, penalties: Staged) -> None:
        index, slots = places.device
        for part in self._parts(len(index)):
            rows, history = x[index[part]], self._history[slots[part]]
            repetition, frequency, presence = penalties.device[:, part, None]
            if plan.repetition:  # of tokens that are not allowed too, whose -inf stays
                rows = torch.where(history != 0, torch.where(rows > 0, rows / repetition, rows * repetition), rows)
            if plan.additive:
                count = history & _COUNT
                rows.sub_(frequency * count).sub_(presence * (count > 0))
            x[index[part]] = rows

    def _parts(self, num_rows: int) -> Iterator[slice]:
        for begin in range(0, num_rows, self._rows_at_once):
            yield slice(begin, min(begin + self._rows_at_once, num_rows))


def _ends_with(output: list[int], ids: list[int]) -> bool:
    return not ids or output[-len(ids) :] == ids
