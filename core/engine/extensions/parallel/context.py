"""Decode context parallel: ranks with the same heads of keys and values hold a part of each sequence's tokens each.

    tokens     0 1 2 3 4 5 6 7 8 9          rank j of c has those with  position % c == j,  side by side:
    rank 0     0 . 2 . 4 . 6 . 8 .          its token i is the sequence's token  i * c + j
    rank 1     . 1 . 3 . 5 . 7 . 9

To the engine a block has c times the tokens that a rank's platform stores in it, so as many blocks hold c times as
much. Each layer gathers the queries of the group's heads, attends to the keys that lie here, and merges what the ranks
found by their log-sum-exp:

    q [N, H, D] -> all-gather -> [N, c H, D] -> attention, with lse -> all-to-all -> c parts [N, H, E] -> merge

Every query is a decode of its own to the platform, whatever it is to the engine: of a prompt's tokens each sees another
number of the keys here, and a mask for that is what lengths are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError, UnsupportedModelError
from engine.extensions.parallel.collectives import Group
from engine.interfaces import (
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    Capabilities,
    ConfigPatch,
    Domain,
    KVCache,
    KVLayout,
    Plan,
    Platform,
)
from engine.model.probe import Observations

_PLAIN = frozenset({"softcap", "v_head_dim"})
"""Features of attention that look at no position."""

_BLOCK_SIZE = 16
"""Tokens of a block that a rank stores, where neither the user nor the platform chooses."""


class ContextPlatform:
    """A platform as the runner of such a rank sees it: blocks have c times the tokens, and attention merges.

    Everything else is the platform's own.

    Args:
        platform: what runs here.
        group: the ranks that hold a sequence between them.
    """

    def __init__(self, platform: Platform, group: Group) -> None:
        self._platform, self._group = platform, group
        if "lse" not in platform.capabilities().attention:
            raise ConfigError(
                f"decode_context_parallel_size merges by the log-sum-exp of attention, and {platform.name} does not "
                "declare the attention feature lse; leave the option out"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def capabilities(self) -> Capabilities:
        """Those of the platform, with the sizes of a block over all ranks."""
        declared, c = self._platform.capabilities(), self._group.size
        return replace(declared, block_sizes=_times(declared.block_sizes, c))

    def configure(self, options: Mapping[str, Any]) -> ConfigPatch:
        """The platform's answer, with the size of a block over all ranks."""
        patch = self._platform.configure(options)
        size = self._group.size * patch.defaults.get("block_size", _BLOCK_SIZE)
        return replace(patch, defaults={**patch.defaults, "block_size": size})

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        """A `ContextAttention`; raises `UnsupportedModelError` for layers that look at positions."""
        if strange := sorted(spec.features() - _PLAIN):
            raise UnsupportedModelError(
                f"decode_context_parallel_size deals out the tokens of layers that see all before them; this model's "
                f"have {', '.join(strange)}; leave the option out"
            )
        wide = replace(spec, num_heads=spec.num_heads * self._group.size)
        return ContextAttention(spec, self._platform.attention(wide), self._group)


def _times(sizes: Domain, factor: int) -> Domain:
    if sizes.values is not None:
        return Domain.of(*(factor * value for value in sizes.values))
    return Domain(step=factor * sizes.step, low=factor * sizes.low, high=sizes.high and factor * sizes.high)


def check_heads(seen: Observations, ranks: int, size: int) -> None:
    """Raise `ConfigError` unless groups of `size` neighbours among `ranks` have the same heads of keys and values."""
    for call in seen.attention:
        heads = call.key.shape[1]
        if ranks % (heads * size):
            raise ConfigError(
                f"decode_context_parallel_size {size} deals out the tokens of heads that several ranks have: the "
                f"{heads} heads of keys and values times {size} must divide tensor_parallel_size, which is {ranks}"
            )


@dataclass(frozen=True)
class _Plan:
    batch: AttentionBatch  # what the platform's plan was made for
    inner: Plan


class ContextAttention(AttentionBackend):
    """Attention of one rank's heads over the tokens of all ranks.

    Args:
        spec: of this rank's heads.
        inner: the platform's, of the heads of all ranks of the group.
        group: the ranks.
    """

    def __init__(self, spec: AttentionSpec, inner: AttentionBackend, group: Group) -> None:
        super().__init__(spec)
        self._inner, self._group = inner, group

    def layout(self, block_size: int) -> KVLayout:
        """The platform's, of this rank's part of the tokens."""
        return self._inner.layout(block_size // self._group.size)

    def plan(self, batch: AttentionBatch) -> Plan:
        """See `AttentionBackend.plan`."""
        mine = self._mine(batch)
        return _Plan(mine, self._inner.plan(mine))

    def refresh(self, plan: Plan, batch: AttentionBatch) -> None:
        """See `AttentionBackend.refresh`."""
        now = self._mine(batch)
        for field in fields(AttentionBatch):
            old, new = getattr(plan.batch, field.name), getattr(now, field.name)
            if isinstance(old, Tensor):
                old.copy_(new)
        self._inner.refresh(plan.inner, plan.batch)

    def _mine(self, batch: AttentionBatch) -> AttentionBatch:
        """The step as the platform sees it: each token a decode, over the tokens of its request that lie here."""
        c, rank, count = self._group.size, self._group.rank, batch.num_tokens
        lengths, owners = _visible(batch.query_start, batch.seq_lens, count)
        host_lengths, _ = _visible(batch.query_start_host, batch.seq_lens_host, count)
        here = batch.slots % c == rank
        return AttentionBatch(
            query_start=torch.arange(count + 1, dtype=torch.int32, device=batch.slots.device),
            seq_lens=_part(lengths, c, rank),
            block_table=batch.block_table.index_select(0, owners),
            slots=torch.where(here, batch.slots // c, 0),
            query_start_host=torch.arange(count + 1, dtype=torch.int32),
            seq_lens_host=_part(host_lengths, c, rank),
            num_decodes=count,
            max_query_len=1,
            max_seq_len=-(-batch.max_seq_len // c),
            block_size=batch.block_size // c,
            captured=batch.captured,
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: KVCache,
        plan: Plan,
        out: Tensor,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> None:
        """See `AttentionBackend.forward`."""
        assert sinks is None
        assert alibi_slopes is None
        assert lse is None
        group, comm, (count, heads, width) = self._group, self._group.communicator, out.shape
        group.entered()
        queries = comm.all_gather(q, 1)
        found = queries.new_empty(count, queries.shape[1], width)
        weights = torch.empty(found.shape[:2], device=q.device)
        self._inner.forward(queries, k, v, cache, plan.inner, found, lse=weights)
        nothing = (plan.batch.seq_lens == 0)[:, None]  # what a platform gives for requests without keys is garbage
        weights.masked_fill_(nothing, -torch.inf)
        found.masked_fill_(nothing[..., None], 0)
        parts = torch.cat((found.float(), weights[..., None]), 2)  # [N, c H, E + 1]
        parts = parts.view(count, group.size, heads, width + 1).transpose(0, 1).flatten(0, 1)
        group.entered()
        parts = comm.all_to_all(parts, [count] * group.size, [count] * group.size)
        parts = parts.view(group.size, count, heads, width + 1)
        nowhere = (parts[..., -1:] == -torch.inf).all(0)  # padding has no keys on any rank
        shares = parts[..., -1:].softmax(0).masked_fill(nowhere, 0)
        out.copy_((parts[..., :-1] * shares).sum(0))


def _visible(query_start: Tensor, seq_lens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each of `count` tokens, the number of its request's tokens that it sees, 0 for padding; and the request."""
    at = torch.arange(count, dtype=torch.int32, device=query_start.device)
    owners = torch.searchsorted(query_start[1:].contiguous(), at, right=True)
    inside = owners < len(seq_lens)
    owners = owners.clamp(max=len(seq_lens) - 1)
    visible = seq_lens[owners] - query_start[owners + 1] + at + 1
    return torch.where(inside, visible, 0).clamp(min=0), owners


def _part(lengths: Tensor, size: int, rank: int) -> Tensor:
    """How many of the first `lengths` tokens rank `rank` of `size` has; int32."""
    return torch.div(lengths + size - 1 - rank, size, rounding_mode="floor").to(torch.int32)
