"""Platforms that are right and differ: in layout, in numerics, in what they declare. None may fail."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from engine_mutation.cache_faults import Halves
from engine_mutation.catalogue import Ops, variant
from engine_mutation.graph_faults import HostGraphs
from engine_mutation.loop import LoopAttention, Request, SplitAttention
from engine_sdk import (
    AttentionBatch,
    BlockLayout,
    Domain,
    ExpertWeights,
    HeadMajor,
    PagedCache,
    TorchCommunicator,
    TorchExperts,
    combine,
)

_L2, _L3, _L4, _L5 = "test_attention.py", "test_kv_cache.py", "test_communicator.py", "test_graphs.py"


@variant(_L2, _L3)
class LoopOfRequests(LoopAttention):
    """One request at a time in fp32: what the faulty attentions are made of."""


@variant(_L2, _L3)
class ReversedSplits(SplitAttention):
    """Splits of 24 keys are computed from the last to the first, and merged by their log-sum-exp."""

    def _splits(self, request: Request) -> list[slice]:
        return super()._splits(request)[::-1]


@variant(_L2)
class SplitsOfSevenKeys(SplitAttention):
    """Splits are far smaller than blocks, and many are masked altogether."""

    _split = 7


@variant(_L2, _L3)
class HeadMajorCache(HeadMajor):
    """A block is stored head by head."""


@variant(_L2, _L3)
class HalvesOfThePool(Halves):
    """All keys lie before all values, cut in the middle of the padded pool, so that layers of any size agree."""

    def __init__(self, *shape: Any) -> None:
        super().__init__(*shape)
        self.block_bytes = 2 * max(self._key_bytes, self.block_bytes - self._key_bytes)

    def bind(self, storage: Tensor, num_blocks: int) -> PagedCache:
        half = storage.numel() // 2
        return self._halves(storage, num_blocks, half // num_blocks, half // num_blocks, half)


@variant(_L2, _L3)
class PackedPairs(BlockLayout):
    """Keys and values of a token lie side by side: [B, K, D + E]."""

    def bind(self, storage: Tensor, num_blocks: int) -> PagedCache:
        both = self.head_dim + self.v_head_dim
        blocks = storage.view(self.kv_dtype).view(num_blocks, -1)[:, : self.block_size * self.num_kv_heads * both]
        pairs = blocks.view(num_blocks, self.block_size, self.num_kv_heads, both)
        return PagedCache(pairs[..., : self.head_dim], pairs[..., self.head_dim :])

    def _canonical(self, blocks: Tensor, dim: int) -> Tensor:
        raise NotImplementedError


@variant(_L2, _L3)
class PaddedHeadSize(BlockLayout):
    """Heads are stored as wide as the next power of two, and what pads them is never written."""

    def __init__(self, *shape: Any) -> None:
        super().__init__(*shape)
        self._wide = 1 << (max(self.head_dim, self.v_head_dim) - 1).bit_length()
        self.block_bytes = 2 * self.block_size * self.num_kv_heads * self._wide * self.kv_dtype.itemsize

    def bind(self, storage: Tensor, num_blocks: int) -> PagedCache:
        blocks = storage.view(self.kv_dtype).view(num_blocks, -1)
        half = self.block_size * self.num_kv_heads * self._wide
        return PagedCache(
            self._canonical(blocks[:, :half], self.head_dim),
            self._canonical(blocks[:, half : 2 * half], self.v_head_dim),
        )

    def _canonical(self, blocks: Tensor, dim: int) -> Tensor:
        return blocks.view(-1, self.block_size, self.num_kv_heads, self._wide)[..., :dim]


@variant(_L2, block_sizes=Domain.multiples(8))
class KernelBlocksOfEight(LoopAttention):
    """The kernel walks blocks of 8 tokens, whatever the manager's blocks hold."""

    def _gather(self, cache: Any, request: Request, at: Tensor) -> tuple[Tensor, Tensor]:
        per = request.batch.block_size // 8
        table = (self._table(request)[:, None] * per + torch.arange(per)).flatten()
        found = [
            part.unflatten(1, (per, 8)).flatten(0, 1)[table[at // 8], at % 8].float()
            for part in (cache.keys, cache.values)
        ]
        return found[0], found[1]


@variant(_L2)
class RoundedProbabilities(LoopAttention):
    """Probabilities are rounded to the activations' dtype before they weigh the values, as flash kernels do."""

    def _weights(self, weights: Tensor) -> Tensor:
        return weights.to(self.spec.dtype).float()


@variant(_L2)
class UnnormalisedUntilTheEnd(LoopAttention):
    """Weights relative to the maximum are rounded and summed, and the sum divides the result at the end."""

    def _part(self, scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        top = scores.amax(-1, keepdim=True).clamp(min=-1e30)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        attended = self._sum(weights.to(self.spec.dtype).float(), values)
        return torch.where(total > 0, attended / total, 0.0), (top + total.log()).squeeze(-1)


@variant(_L2, numerics="B")
class ScoresOfClassB(LoopAttention):
    """Scores are rounded to the activations' dtype, and class B is declared."""

    def _products(self, q: Tensor, keys: Tensor) -> Tensor:
        return super()._products(q, keys).to(self.spec.dtype).float()


@variant(_L2, numerics="B")
class QueryScaledFirst(LoopAttention):
    """The query is scaled and rounded before the product, and class B is declared."""

    def _scores(self, q: Tensor, keys: Tensor) -> Tensor:
        return self._cap(self._products((q * self._scale()).to(self.spec.dtype).float(), keys))


@variant(_L2, nan_safe=False)
class TailNotNanSafe(LoopAttention):
    """Whole blocks are read, and hidden positions get a weight of zero, which NaN would survive: not declared."""

    def _key_positions(self, request: Request) -> Tensor:
        size = request.batch.block_size
        return torch.arange(-(-request.length // size) * size)

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        return super()._sees(query, key, request) & (key < request.length)

    def _clear(self, keys: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values


@variant(_L2)
class FlushesToZero(LoopAttention):
    """Subnormal numbers become zero, in what is read and in what is written."""

    def _gather(self, cache: Any, request: Request, at: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super()._gather(cache, request, at)
        return self._flush(keys), self._flush(values)

    def _round(self, x: Tensor) -> Tensor:
        return self._flush(super()._round(x))

    def _weights(self, weights: Tensor) -> Tensor:
        return self._flush(weights)

    def _flush(self, x: Tensor) -> Tensor:
        return x.masked_fill(x.abs() < 2.0**-126, 0)


@variant(_L2)
class DecodesAndPrefillsApart(LoopAttention):
    """One kernel for decodes, in splits, and another one for the rest, in tiles of 64 queries."""

    def _splits(self, request: Request) -> list[slice]:
        step = 33 if request.is_decode else max(1, request.length)
        return [slice(i, i + step) for i in range(0, request.length, step)]

    def _requests(self, batch: AttentionBatch) -> list[Request]:
        tiles = []
        for request in super()._requests(batch):
            begin, end = request.tokens.start, request.tokens.stop
            for at in range(begin, end, 64):
                stop = min(end, at + 64)
                tiles.append(dataclasses.replace(request, tokens=slice(at, stop), length=request.length - (end - stop)))
        return tiles if self.spec.causal else super()._requests(batch)


@variant(_L2)
class ClearsPaddedRows(LoopAttention):
    """Requests without keys get zeros, which nobody reads."""

    def forward(self, q: Tensor, k: Any, v: Any, cache: Any, plan: Any, out: Tensor, **extras: Any) -> None:
        super().forward(q, k, v, cache, plan, out, **extras)
        for row in range(plan.num_requests):
            begin, end = plan.query_start[row : row + 2].tolist()
            if not plan.seq_lens[row]:
                out[begin:end] = 0


@variant(_L2)
class WritesPaddingNowhere(LoopAttention):
    """What belongs in block 0 is not written at all."""

    def _write(self, cache: Any, batch: AttentionBatch, k: Tensor, v: Tensor) -> None:
        blocks, offsets = self._slots(batch)
        real = blocks > 0
        cache.keys.index_put_((blocks[real], offsets[real]), self._to_cache(k[real]))
        cache.values.index_put_((blocks[real], offsets[real]), self._to_cache(v[real]))


@variant(_L2, batch_invariant=True)
class BatchInvariant(SplitAttention):
    """Splits of a fixed size, so that a request's bits do not depend on its neighbours; declared."""


@variant(_L2, deterministic=False)
class SplitsInAnyOrder(SplitAttention):
    """Splits are added in another order each time, and determinism is not declared."""

    _turn = 0

    def _merge(self, parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        self._turn = (self._turn + 1) % len(parts)
        return super()._merge(parts[self._turn :] + parts[: self._turn], sinks)


# Narrow domains.


@variant(
    "test_device.py",
    _L2,
    _L3,
    _L5,
    head_dims=Domain.of(64, 128),
    block_sizes=Domain.of(16),
    attention=frozenset(),
    dtypes=frozenset({torch.float32, torch.bfloat16}),
    kv_dtypes=frozenset({torch.float32, torch.bfloat16}),
    nan_safe=False,
)
class BareMinimum(LoopAttention):
    """Two head sizes, one block size, no optional feature, no fp16."""


@variant(_L2, _L3, block_sizes=Domain.of(128), head_dims=Domain.multiples(32, high=256))
class BlocksOf128(LoopAttention):
    """Blocks of 128 tokens and nothing else."""


@variant(
    _L2, _L3, dtypes=frozenset({torch.float32, torch.float16}), kv_dtypes=frozenset({torch.float32, torch.float16})
)
class NoBf16(LoopAttention):
    """An older chip without bf16."""


@variant(_L2, attention=frozenset({"sliding_window"}))
class WindowsOnly(LoopAttention):
    """Sliding windows are the only optional feature."""


@variant(_L4, "test_device.py", collectives=frozenset())
class NoCommunicator(LoopAttention):
    """One device alone: no collectives are declared, and none are made."""


# Communication, graphs, operations.


@variant(_L4)
class GatherThenSum(TorchCommunicator):
    """All-reduce is an all-gather and a sum in rank order, the same on every rank."""

    def all_reduce(self, x: Tensor) -> Tensor:
        parts = self.all_gather(x[None])
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total


@variant(_L4)
class ScatterThenGather(TorchCommunicator):
    """All-reduce is a reduce-scatter and an all-gather, padded to equal parts."""

    def all_reduce(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        padded = torch.cat((flat, flat.new_zeros(-len(flat) % self.size)))
        return self.all_gather(self.reduce_scatter(padded))[: len(flat)].view(x.shape)


@variant(_L2, _L5, graphs="full")
class HostReplay(HostGraphs):
    """A host's graphs, which call what was captured again, for any batch."""


@variant(_L5, graphs="uniform")
class HostReplayOfDecodes(HostGraphs):
    """A host's graphs, declared for decodes only."""


@variant("test_ops.py")
class OpsInFp32(Ops):
    """Operations compute in fp32 and round once, at their end."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)

    @staticmethod
    def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
        return (gate.float() * torch.sigmoid(gate.float()) * up.float()).to(gate.dtype)

    @staticmethod
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turn(x: Tensor) -> Tensor:
            first, second = x.float().chunk(2, -1)
            other = torch.cat((-second, first), -1)
            return (x.float() * cos.float().unsqueeze(-3) + other * sin.float().unsqueeze(-3)).to(x.dtype)

        return turn(q), turn(k)


@variant("test_ops.py")
class EveryExpertOfEveryToken(TorchExperts):
    """All experts run on all tokens, and what was not chosen is dropped: no wait for the router."""

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        return combine(self._all(x, expert_ids, weights), expert_ids, scores, self.spec.num_experts)
