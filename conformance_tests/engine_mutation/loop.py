"""Paged attention made to be broken: correct, slow, and with a method for every step that a kernel may get wrong.

One request at a time, in fp32. Nothing is prepared: the lengths are read from the device's tensors at each call, so it
is right when a captured step is replayed too. Shapes: T queries and L keys of a request; the other letters are those
of `engine_sdk.AttentionBackend`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine_sdk import (
    ATTENTION_FEATURES,
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    BlockLayout,
    Capabilities,
    KVLayout,
    TokenMajor,
    UnsupportedCapability,
    to_cache,
)


@dataclass
class Request:
    """One request of a step: row `index` of the batch, which owns `tokens`, and is `length` tokens long with them."""

    batch: AttentionBatch
    index: int
    tokens: slice
    length: int

    @property
    def num_queries(self) -> int:
        """T."""
        return int(self.tokens.stop - self.tokens.start)

    @property
    def is_decode(self) -> bool:
        """Whether it is one of the leading requests with one query token."""
        return self.index < self.batch.num_decodes


class LoopAttention(AttentionBackend):
    """Right in every feature; a mutant overrides one step."""

    features = ATTENTION_FEATURES
    _layout: ClassVar[type[BlockLayout]] = TokenMajor

    def __init__(self, spec: AttentionSpec, declared: Capabilities) -> None:
        super().__init__(spec)
        self._declared = declared

    def layout(self, block_size: int) -> KVLayout:
        if block_size not in self._declared.block_sizes:
            raise UnsupportedCapability("block_sizes", block_size, f"declared: {self._declared.block_sizes}")
        spec = self.spec
        return self._layout(block_size, spec.num_kv_heads, spec.head_dim, spec.v_head_dim, spec.kv_dtype)

    def plan(self, batch: AttentionBatch) -> Any:
        return batch

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: Any,
        plan: Any,
        out: Tensor,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> None:
        if lse is not None and "lse" not in self._declared.attention:
            raise UnsupportedCapability("lse", True, f"declared: {sorted(self._declared.attention)}")
        if k is not None and v is not None:
            self._write(cache, plan, k, v)
        for request in self._requests(plan):
            attended, logsum = self._attend(self._queries(q, request), cache, request, sinks, alibi_slopes)
            self._store(out, attended, request)
            if lse is not None:
                self._store_lse(lse, logsum, request)

    # The cache.

    def _slots(self, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
        """Block and offset where each token of the step is written, int64 [N]."""
        return batch.slots // batch.block_size, batch.slots % batch.block_size

    def _write(self, cache: Any, batch: AttentionBatch, k: Tensor, v: Tensor) -> None:
        blocks, offsets = self._slots(batch)
        cache.keys.index_put_((blocks, offsets), self._to_cache(k))
        cache.values.index_put_((blocks, offsets), self._to_cache(v))

    def _to_cache(self, x: Tensor) -> Tensor:
        return to_cache(x, self.spec.kv_dtype)

    def _table(self, request: Request) -> Tensor:
        """The request's row of the block table, int64 [W]."""
        return request.batch.block_table[request.index].long()

    def _gather(self, cache: Any, request: Request, at: Tensor) -> tuple[Tensor, Tensor]:
        """Keys fp32 [L, K, D] and values fp32 [L, K, E] at positions `at`."""
        size = request.batch.block_size
        blocks, offsets = self._table(request)[at // size], at % size
        return cache.keys[blocks, offsets].float(), cache.values[blocks, offsets].float()

    # The requests, and where their queries and keys stand.

    def _requests(self, batch: AttentionBatch) -> list[Request]:
        starts, lengths = batch.query_start.tolist(), batch.seq_lens.tolist()
        requests = (
            Request(batch, i, slice(starts[i], starts[i + 1]), length) for i, length in enumerate(lengths) if length > 0
        )
        return [request for request in requests if request.num_queries]

    def _queries(self, q: Tensor, request: Request) -> Tensor:
        """fp32 [T, H, D]."""
        return q[request.tokens].float()

    def _query_positions(self, request: Request) -> Tensor:
        return torch.arange(request.length - request.num_queries, request.length)

    def _key_positions(self, request: Request) -> Tensor:
        return torch.arange(request.length)

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        """bool [T, L] from positions [T, 1] and [1, L]."""
        spec = self.spec
        seen = (key <= query) if spec.causal else (key <= request.length - 1) & (query >= 0)
        if spec.window is not None:
            seen = seen & (key > query - spec.window) & (key < query + spec.window)
        if spec.chunk is not None:
            seen = seen & (key // spec.chunk == query // spec.chunk)
        return seen

    # Scores, and the sum over the keys.

    def _attend(
        self, q: Tensor, cache: Any, request: Request, sinks: Tensor | None, slopes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output fp32 [T, H, E] and log-sum-exp fp32 [T, H]."""
        query, key = self._query_positions(request)[:, None], self._key_positions(request)[None]
        seen = self._sees(query, key, request)
        keys, values = self._clear(*self._gather(cache, request, key[0]), seen)
        heads = self._kv_head(torch.arange(self.spec.num_heads))
        scores = self._scores(q, keys[:, heads])
        if slopes is not None:
            scores = scores + self._bias(slopes.float(), (key - query).float())
        scores = self._mask(scores, seen)
        parts = [self._part(scores[..., s], values[s][:, heads]) for s in self._splits(request)]
        attended, logsum = self._merge(parts, None if sinks is None else sinks.float()[:, None])
        return attended.transpose(0, 1), logsum.T

    def _clear(self, keys: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Positions that no query sees may hold NaN, which a weight of zero would not stop."""
        hidden = ~seen.any(0)[:, None, None]
        return keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)

    def _kv_head(self, head: Tensor) -> Tensor:
        return head // (self.spec.num_heads // self.spec.num_kv_heads)

    def _scale(self) -> float:
        return self.spec.scale

    def _scores(self, q: Tensor, keys: Tensor) -> Tensor:
        """[H, T, L] from [T, H, D] and [L, H, D]."""
        return self._cap(self._products(q, keys) * self._scale())

    def _products(self, q: Tensor, keys: Tensor) -> Tensor:
        return torch.einsum("thd,lhd->htl", q, keys)

    def _cap(self, scores: Tensor) -> Tensor:
        cap = self.spec.softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def _bias(self, slopes: Tensor, distance: Tensor) -> Tensor:
        """[H, T, L]: ALiBi's, or from a table by distance."""
        if (reach := self.spec.relative) is not None:
            return slopes[:, distance.clamp(-reach, reach).long() + reach]
        return slopes[:, None, None] * distance

    def _mask(self, scores: Tensor, seen: Tensor) -> Tensor:
        return scores.masked_fill(~seen, -torch.inf)

    def _splits(self, request: Request) -> list[slice]:
        """The parts of the keys that are attended to one by one, then merged."""
        return [slice(None)]

    def _part(self, scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised output [H, T, E] and log-sum-exp [H, T] of some keys: zero and -inf where none is seen."""
        logsum = scores.logsumexp(-1)
        weights = torch.where(logsum[..., None].isneginf(), 0.0, (scores - logsum[..., None]).exp())
        return self._sum(self._weights(weights), values), logsum

    def _weights(self, weights: Tensor) -> Tensor:
        return weights

    def _sum(self, weights: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("htl,lhe->hte", weights, values)

    def _merge(self, parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        total = torch.stack([logsum for _, logsum in parts]).logsumexp(0)
        if sinks is not None:
            total = torch.logaddexp(total, sinks)
        attended = sum((out * (logsum - total).exp()[..., None] for out, logsum in parts), torch.zeros(()))
        return attended, total

    # The results.

    def _store(self, out: Tensor, attended: Tensor, request: Request) -> None:
        out[request.tokens] = self._round(attended)

    def _round(self, x: Tensor) -> Tensor:
        return x.to(self.spec.dtype)

    def _store_lse(self, lse: Tensor, logsum: Tensor, request: Request) -> None:
        lse[request.tokens] = logsum


class SplitAttention(LoopAttention):
    """Keys in splits that are merged by their log-sum-exp, as kernels do to keep a device busy with few requests."""

    _split: ClassVar[int] = 24

    def _splits(self, request: Request) -> list[slice]:
        return [slice(i, i + self._split) for i in range(0, request.length, self._split)]
