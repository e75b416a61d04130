"""From a `Step` to tensors: per-row state on the host, and one step's arrays, staged for a single copy.

Legend of shapes: N tokens, R sequences with work, S sampled rows, P prompt positions whose logits are wanted, V words;
of a step that is padded to a `StepShape`, N and R are the shape's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.interfaces import AttentionBatch
from engine.kv.spec import KVGroup
from engine.staging import Staged, Staging
from engine.step import NewRow, Step, Work

Array = np.ndarray[Any, Any]


class Rows:
    """What the runner knows of each row: token ids from the host, block tables, and where the device sampled last.

    Tables have one row more, which padding uses: its blocks are all block 0.
    """

    def __init__(self, num_rows: int, max_len: int, groups: Sequence[KVGroup]) -> None:
        self.token_ids = np.zeros((num_rows, max_len), np.int64)
        self.tables = [np.zeros((num_rows + 1, -(-max_len // g.spec.block_size)), np.int32) for g in groups]
        self.table_lens = np.zeros((len(groups), num_rows), np.int64)
        self.changed: list[list[Array]] = [[] for _ in groups]
        """Of each group, flat indices into its table that the device does not know yet."""
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
                begin = row * self.tables[group].shape[1] + self.table_lens[group, row]
                self.tables[group].reshape(-1)[begin : begin + len(ids)] = ids
                self.table_lens[group, row] += len(ids)
                self.changed[group].append(np.arange(begin, begin + len(ids)))


@dataclass(frozen=True)
class StepShape:
    """A size that steps are padded to, so that one captured graph serves them.

    Attributes:
        num_tokens: N.
        num_requests: R.
        max_seq_len: the longest sequence may have so many tokens.
        uniform: every request is a decode, and token i is request i's.
    """

    num_tokens: int
    num_requests: int
    max_seq_len: int
    uniform: bool


@dataclass
class Batch:
    """One step's tensors; those on the device are valid after `Staging.upload`."""

    work: list[Work]  # the step's work in batch order, decodes first
    order: list[int]  # `order[i]` is the index in `Step.work` of `work[i]`
    input_ids: Staged  # int64 [N]
    # int64 [N], the row whose last sampled token is the input, -1 where `input_ids` holds it
    feed: Staged
    positions: Staged  # int64 [N]
    rows: Staged  # int64 [R]
    query_start: Staged  # int32 [R + 1]
    seq_lens: Staged  # int32 [R]
    slots: list[Staged]  # of each group, int64 [N]
    logits_index: Staged  # int64 [S + P], tokens whose logits are wanted: the sampled ones, then prompt positions
    sampled: list[int]  # indices into `work` of the S sampled entries
    sampled_rows: Staged  # int64 [S]
    prompt_next: Staged | None  # int64 [P], the token after each wanted prompt position
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    captured: bool


class BatchBuilder:
    """Keeps `Rows` and turns each step into a `Batch`; the device keeps a copy of the block tables."""

    def __init__(
        self, num_rows: int, max_len: int, groups: Sequence[KVGroup], staging: Staging, device: torch.device
    ) -> None:
        self.rows = Rows(num_rows, max_len, groups)
        self._num_rows = num_rows
        self._block_sizes = [g.spec.block_size for g in groups]
        self._staging = staging
        self._tables = [torch.zeros(t.shape, dtype=torch.int32, device=device) for t in self.rows.tables]
        self._updates: list[tuple[Tensor, Staged, Staged]] = []

    def nbytes(self, step: Step, shape: StepShape | None) -> int:
        """An upper bound of what `build` stages, for `Staging.begin`."""
        n, r = (shape.num_tokens, shape.num_requests) if shape else (step.num_tokens, len(step.work))
        changed = sum(len(part) for parts in self.rows.changed for part in parts)
        return 8 * ((6 + len(self._block_sizes)) * n + 8 * r + 64) + 12 * changed + 4096

    def apply(self, step: Step) -> None:
        """Take over rows and blocks that the step brings."""
        for new in step.new_rows:
            self.rows.enter(new)
        for work in step.work:
            self.rows.append_blocks(work.row, work.new_blocks)

    def build(self, step: Step, shape: StepShape | None) -> Batch:
        """Stage the step's arrays, padded to `shape` if given; `Staging.begin` has run, `apply` too.

        What a captured graph reads is staged first and in one order, so that it lies where it lay at the capture.
        """
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
        tokens, requests = (shape.num_tokens, shape.num_requests) if shape else (len(positions), len(work))

        # a sampled token is an input exactly once, as a decode, at the position where the device sampled it
        fed = np.full(tokens, -1)
        held = self.rows.sampled_at[rows[:num_decodes]] == starts[:num_decodes]
        fed[:num_decodes][held] = rows[:num_decodes][held]
        sampled = [i for i, w in enumerate(work) if w.sample]
        self.rows.sampled_at[rows[sampled]] = seq_lens[sampled]

        wanted = [
            np.arange(e - w.num_tokens, e - w.num_tokens + w.num_prompt_logits)
            for w, e in zip(work, ends, strict=True)
            if w.num_prompt_logits
        ]
        prompt = np.concatenate(wanted) if wanted else np.zeros(0, np.int64)
        logits_index = np.concatenate((ends[sampled] - 1, prompt))
        # padding: tokens at position 0 of a row without blocks; requests of length 0, each with a token if uniform
        beyond = np.arange(ends[-1], ends[-1] + requests - len(work)) + 1 if shape and shape.uniform else ends[-1]
        query_start = np.concatenate(([0], ends, np.broadcast_to(beyond, requests - len(work))))
        put = self._staging.add
        return Batch(
            work=work,
            order=order,
            input_ids=put(_pad(self.rows.token_ids[token_rows, positions], tokens)),
            feed=put(fed),
            positions=put(_pad(positions, tokens)),
            rows=put(_pad(rows, requests, self._num_rows)),
            query_start=put(query_start.astype(np.int32)),
            seq_lens=put(_pad(seq_lens, requests).astype(np.int32)),
            slots=[
                put(_pad(table[token_rows, positions // size].astype(np.int64) * size + positions % size, tokens))
                for table, size in zip(self.rows.tables, self._block_sizes, strict=True)
            ],
            logits_index=put(_pad(logits_index, requests) if shape else logits_index),
            sampled=sampled,
            sampled_rows=put(rows[sampled]),
            prompt_next=put(self.rows.token_ids[token_rows[prompt], positions[prompt] + 1]) if wanted else None,
            num_decodes=num_decodes if shape is None else requests if shape.uniform else 0,
            max_query_len=int(nums.max()) if shape is None else 1 if shape.uniform else tokens,
            max_seq_len=shape.max_seq_len if shape else int(seq_lens.max()),
            captured=shape is not None,
        )

    def stage_tables(self) -> None:
        """Stage what changed in the tables since the last step."""
        self._updates = []
        for device, host, parts in zip(self._tables, self.rows.tables, self.rows.changed, strict=True):
            if parts:
                index = np.concatenate(parts)
                put = self._staging.add
                self._updates.append((device.view(-1), put(index), put(host.reshape(-1)[index])))
                parts.clear()

    def update_tables(self) -> None:
        """Bring the device's tables up to date, after `Staging.upload`."""
        for table, index, values in self._updates:
            table.index_copy_(0, index.device, values.device)

    def attention(self, batch: Batch) -> list[AttentionBatch]:
        """The step as each KV group sees it."""
        return [
            AttentionBatch(
                query_start=batch.query_start.device,
                seq_lens=batch.seq_lens.device,
                block_table=table[:, : -(-batch.max_seq_len // size)].index_select(0, batch.rows.device),
                slots=slots.device,
                query_start_host=batch.query_start.host,
                seq_lens_host=batch.seq_lens.host,
                num_decodes=batch.num_decodes,
                max_query_len=batch.max_query_len,
                max_seq_len=batch.max_seq_len,
                block_size=size,
                captured=batch.captured,
            )
            for table, slots, size in zip(self._tables, batch.slots, self._block_sizes, strict=True)
        ]

    def select_tables(self, batch: Batch, groups: Sequence[AttentionBatch]) -> None:
        """Fill the block tables of `groups` anew, for the rows of `batch`."""
        for table, group in zip(self._tables, groups, strict=True):
            part = table[:, : group.block_table.shape[1]]
            torch.index_select(part, 0, batch.rows.device, out=group.block_table)


def _pad(array: Array, size: int, value: int = 0) -> Array:
    padded = np.full(size, value, array.dtype)
    padded[: len(array)] = array
    return padded


def feed_sampled(input_ids: Tensor, feed: Tensor, last_sampled: Tensor) -> Tensor:
    """`input_ids` with tokens that the device sampled, int64 [rows], where the host does not know them."""
    return last_sampled[feed.clamp(min=0)].where(feed >= 0, input_ids)
