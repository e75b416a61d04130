"""From a `Step` to tensors: per-row state on the host, and one step's arrays, staged for a single copy.

Legend of shapes: N tokens, R sequences with work, S sampled rows, P prompt positions whose logits are wanted, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from engine.interfaces import AttentionBatch
from engine.kv.spec import KVGroup
from engine.staging import Staged, Staging
from engine.step import NewRow, Step, Work

Array = np.ndarray[Any, Any]


class Rows:
    """What the runner knows of each row: token ids from the host, block tables, and where the device sampled last."""

    def __init__(self, num_rows: int, max_len: int, groups: Sequence[KVGroup]) -> None:
        self.token_ids = np.zeros((num_rows, max_len), np.int64)
        self.tables = [np.zeros((num_rows, -(-max_len // g.spec.block_size)), np.int32) for g in groups]
        self.table_lens = np.zeros((len(groups), num_rows), np.int64)
        self.sampled_at = np.full(num_rows, -1, np.int64)
        """Position of the token that the device holds for the row, -1 when all its tokens came from the host."""

    def enter(self, new: NewRow) -> None:
        """A sequence takes the row."""
        self.token_ids[new.row, : len(new.token_ids)] = new.token_ids
        self.sampled_at[new.row] = -1
        self.table_lens[:, new.row] = 0
        self.append_blocks(new.row, new.block_ids)

    def append_blocks(self, row: int, blocks: list[list[int]]) -> None:
        """Blocks of each group join the row's tables."""
        for group, ids in enumerate(blocks):
            if ids:
                begin = self.table_lens[group, row]
                self.tables[group][row, begin : begin + len(ids)] = ids
                self.table_lens[group, row] = begin + len(ids)


@dataclass
class Batch:
    """One step's tensors; those on the device are valid after `Staging.upload`."""

    work: list[Work]  # the step's work in batch order, decodes first
    order: list[int]  # `order[i]` is the index in `Step.work` of `work[i]`
    input_ids: Staged  # int64 [N]
    # int64 [num_decodes], the row whose last sampled token is the input, -1 where `input_ids` holds it
    feed: Staged | None
    positions: Staged  # int64 [N]
    logits_index: Staged  # int64 [S + P], tokens whose logits are wanted: the sampled ones, then prompt positions
    sampled: list[int]  # indices into `work` of the S sampled entries
    sampled_rows: Staged  # int64 [S]
    prompt_next: Staged | None  # int64 [P], the token after each wanted prompt position
    groups: list[tuple[Staged, Staged]]
    query_start: Staged
    seq_lens: Staged
    num_decodes: int
    max_query_len: int
    max_seq_len: int

    def attention(self, group: int, block_size: int) -> AttentionBatch:
        """The step as one KV group sees it."""
        table, slots = self.groups[group]
        return AttentionBatch(
            query_start=self.query_start.device,
            seq_lens=self.seq_lens.device,
            block_table=table.device,
            slots=slots.device,
            query_start_host=self.query_start.host,
            seq_lens_host=self.seq_lens.host,
            num_decodes=self.num_decodes,
            max_query_len=self.max_query_len,
            max_seq_len=self.max_seq_len,
            block_size=block_size,
        )


class BatchBuilder:
    """Keeps `Rows` and turns each step into a `Batch`."""

    def __init__(self, num_rows: int, max_len: int, groups: Sequence[KVGroup], staging: Staging) -> None:
        self.rows = Rows(num_rows, max_len, groups)
        self._block_sizes = [g.spec.block_size for g in groups]
        self._staging = staging

    def nbytes(self, step: Step) -> int:
        """An upper bound of what `build` stages, for `Staging.begin`."""
        n, r = step.num_tokens, len(step.work)
        tables = sum(-(-max(w.start + w.num_tokens for w in step.work) // b) for b in self._block_sizes)
        return 8 * (5 * n + 8 * r + 64) + len(self._block_sizes) * (8 * n + 64) + 4 * r * tables + 4096

    def apply(self, step: Step) -> None:
        """Take over rows and blocks that the step brings."""
        for new in step.new_rows:
            self.rows.enter(new)
        for work in step.work:
            self.rows.append_blocks(work.row, work.new_blocks)

    def build(self, step: Step) -> Batch:
        """Stage the step's arrays; `Staging.begin` has run, `apply` too."""
        order = sorted(range(len(step.work)), key=lambda i: step.work[i].num_tokens > 1)
        work = [step.work[i] for i in order]
        rows = np.array([w.row for w in work], np.int64)
        starts = np.array([w.start for w in work], np.int64)
        nums = np.array([w.num_tokens for w in work], np.int64)
        ends = np.cumsum(nums)
        owner = np.repeat(np.arange(len(work)), nums)
        positions = np.arange(ends[-1]) - (ends - nums)[owner] + starts[owner]
        token_rows = rows[owner]
        seq_lens = starts + nums
        num_decodes = int((nums == 1).sum())

        # a sampled token is an input exactly once, as a decode, at the position where the device sampled it
        fed = self.rows.sampled_at[rows[:num_decodes]] == starts[:num_decodes]
        sampled = [i for i, w in enumerate(work) if w.sample]
        self.rows.sampled_at[rows[sampled]] = seq_lens[sampled]

        wanted = [
            np.arange(e - w.num_tokens, e - w.num_tokens + w.num_prompt_logits)
            for w, e in zip(work, ends, strict=True)
            if w.num_prompt_logits
        ]
        prompt = np.concatenate(wanted) if wanted else np.zeros(0, np.int64)
        put = self._staging.add
        return Batch(
            work=work,
            order=order,
            input_ids=put(self.rows.token_ids[token_rows, positions]),
            feed=put(np.where(fed, rows[:num_decodes], -1)) if fed.any() else None,
            positions=put(positions),
            logits_index=put(np.concatenate((ends[sampled] - 1, prompt))),
            sampled=sampled,
            sampled_rows=put(rows[sampled]),
            prompt_next=put(self.rows.token_ids[token_rows[prompt], positions[prompt] + 1]) if wanted else None,
            groups=[
                self._group(g, rows, token_rows, positions, int(seq_lens.max())) for g in range(len(self._block_sizes))
            ],
            query_start=put(np.concatenate(([0], ends)).astype(np.int32)),
            seq_lens=put(seq_lens.astype(np.int32)),
            num_decodes=num_decodes,
            max_query_len=int(nums.max()),
            max_seq_len=int(seq_lens.max()),
        )

    def _group(self, g: int, rows: Array, token_rows: Array, positions: Array, max_len: int) -> tuple[Staged, Staged]:
        """The block table [R, W] and the slots [N] of one group."""
        size, table = self._block_sizes[g], self.rows.tables[g]
        slots = table[token_rows, positions // size].astype(np.int64) * size + positions % size
        return self._staging.add(table[rows, : -(-max_len // size)]), self._staging.add(slots)


def feed_sampled(input_ids: Tensor, feed: Tensor, last_sampled: Tensor) -> None:
    """Put tokens that the device sampled, int64 [rows], where the step's inputs are not known to the host."""
    head = input_ids[: feed.shape[0]]
    head.copy_(last_sampled[feed.clamp(min=0)].where(feed >= 0, head))
