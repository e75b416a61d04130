"""Attention that sees the right keys and computes, stores or writes them wrongly: sums, casts, splits, strides."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine_mutation.catalogue import fault
from engine_mutation.loop import LoopAttention, Request, SplitAttention
from engine_sdk import AttentionBatch, to_cache

_AGREES = "test_attention.py::test_agrees_with_reference"
_CAUSAL = f"{_AGREES}[causal]"
_LSE = f"{_AGREES}[lse]"

# The softmax, and its splits.


@fault("L2", _CAUSAL)
class LastSplitLost(SplitAttention):
    """The number of splits is rounded down."""

    def _splits(self, request: Request) -> list[slice]:
        splits = super()._splits(request)
        return splits[:-1] if len(splits) > 1 and request.length % self._split else splits


@fault("L2", _CAUSAL)
class SplitsMergedWithoutRescale(SplitAttention):
    """Splits are averaged as if all had the same sum."""

    def _merge(self, parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        _, total = super()._merge(parts, sinks)
        return torch.stack([out for out, _ in parts]).mean(0), total


@fault("L2", f"{_AGREES}[sliding_window]")
class MaskedSplitGivesNan(SplitAttention):
    """A split of which no key is seen divides zero by zero."""

    def _part(self, scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._sum(scores.softmax(-1), values), scores.logsumexp(-1)


@fault("L2", _CAUSAL)
class RunningMaximumOfTheFirstSplit(SplitAttention):
    """Sums are kept relative to the first split's maximum, and overflow when a later one is much larger."""

    def _merge(self, parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        first = parts[0][1]
        terms = [((logsum - first) * 1.0).exp().half().float()[..., None] for _, logsum in parts]
        attended = sum((t * out for t, (out, _) in zip(terms, parts, strict=True)), torch.zeros(()))
        return attended / sum(terms, torch.zeros(())), super()._merge(parts, sinks)[1]


@fault("L2", _CAUSAL)
class NoMaximumSubtracted(LoopAttention):
    """Exponentials are taken of the scores themselves, which overflow."""

    def _part(self, scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        weights = scores.half().exp().float()
        return self._sum(weights / weights.sum(-1, keepdim=True), values), scores.logsumexp(-1)


@fault("L2", _CAUSAL)
class HiddenScoreIsZero(LoopAttention):
    """The mask multiplies scores, so hidden keys have a score of 0 instead of -inf."""

    def _mask(self, scores: Tensor, seen: Tensor) -> Tensor:
        return scores * seen


@fault("L2", _CAUSAL)
class ZeroTimesNan(LoopAttention):
    """Hidden positions are multiplied by a weight of zero, which NaN survives, and `nan_safe` is declared."""

    def _clear(self, keys: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def _key_positions(self, request: Request) -> Tensor:
        size = request.batch.block_size
        return torch.arange(-(-request.length // size) * size)

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        return super()._sees(query, key, request) & (key < request.length)


# Precision that was not declared.


@fault("L2", _CAUSAL)
class RoundedScores(LoopAttention):
    """Scores are rounded to the activations' dtype, which is class B, and class A is declared."""

    def _products(self, q: Tensor, keys: Tensor) -> Tensor:
        return super()._products(q, keys).to(self.spec.dtype).float()


@fault("L2", _CAUSAL)
class PreScaledQuery(LoopAttention):
    """The query is scaled and rounded before the product, which is class B, and class A is declared."""

    def _scores(self, q: Tensor, keys: Tensor) -> Tensor:
        return self._cap(self._products((q * self._scale()).to(self.spec.dtype).float(), keys))


@fault("L2", _CAUSAL)
class Fp8Probabilities(LoopAttention):
    """Probabilities are rounded to 8 bits."""

    def _weights(self, weights: Tensor) -> Tensor:
        return weights.to(torch.float8_e4m3fn).float()


@fault("L2", _CAUSAL)
class LowPrecisionAccumulator(LoopAttention):
    """The weighted sum of values is rounded to the activations' dtype after every 16 keys."""

    def _sum(self, weights: Tensor, values: Tensor) -> Tensor:
        total = torch.zeros(())
        for w, v in zip(weights.split(16, -1), values.split(16), strict=True):
            total = (total + super()._sum(w, v)).to(self.spec.dtype).float()
        return total


@fault("L2", _CAUSAL)
class Tf32Products(LoopAttention):
    """fp32 products keep 10 bits of the mantissa."""

    def _products(self, q: Tensor, keys: Tensor) -> Tensor:
        def tf32(x: Tensor) -> Tensor:
            return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

        return super()._products(tf32(q), tf32(keys))


@fault("L2", "test_attention.py::test_rounding_has_no_bias")
class TruncatingCast(LoopAttention):
    """The output is cut off instead of rounded, which hides in any bound on single elements."""

    def _round(self, x: Tensor) -> Tensor:
        bits = 16 if self.spec.dtype is torch.bfloat16 else 13
        low = x.contiguous().view(torch.int32) & ~((1 << bits) - 1)
        return low.view(torch.float32).to(self.spec.dtype) if self.spec.dtype is not torch.float32 else x


@fault("L2", _CAUSAL)
class ApproximateExponential(LoopAttention):
    """Exponentials come from a polynomial that is right to three digits."""

    def _weights(self, weights: Tensor) -> Tensor:
        return weights * (1 + 2e-3 * (weights * 37).sin())


@fault("L2", _CAUSAL)
class DenominatorOfRoundedWeights(LoopAttention):
    """The numerator's weights lose those below 2**-7, and the denominator counts them."""

    def _weights(self, weights: Tensor) -> Tensor:
        return weights.masked_fill(weights < 2.0**-7, 0)


# Results: which rows are written, and where.


@fault("L2", _CAUSAL)
class LastRowUnwritten(LoopAttention):
    """The last token's output is left as it was."""

    def _store(self, out: Tensor, attended: Tensor, request: Request) -> None:
        if request.index == request.batch.num_requests - 1:
            attended[-1] = out[request.tokens][-1].float()
        super()._store(out, attended, request)


@fault("L2", _CAUSAL)
class OutputClearedFirst(LoopAttention):
    """The whole output is set to zero, that of padding tokens included."""

    def forward(self, q: Tensor, k: Any, v: Any, cache: Any, plan: Any, out: Tensor, **extras: Any) -> None:
        out.zero_()
        super().forward(q, k, v, cache, plan, out, **extras)


@fault("L2", _CAUSAL)
class SortedRowsNotPutBack(LoopAttention):
    """Decodes are sorted by length to balance the work, and their outputs are stored in that order."""

    def _store(self, out: Tensor, attended: Tensor, request: Request) -> None:
        if request.is_decode:
            order = request.batch.seq_lens[: request.batch.num_decodes].sort(stable=True).indices
            place = int(order[request.index])
            request = Request(request.batch, request.index, slice(place, place + 1), request.length)
        super()._store(out, attended, request)


@fault("L2", _CAUSAL)
class QueryTakenForContiguous(LoopAttention):
    """The query is read with dense strides, whatever its own are: wrong for a slice of a fused projection."""

    def forward(self, q: Tensor, k: Any, v: Any, cache: Any, plan: Any, out: Tensor, **extras: Any) -> None:
        dense = q.as_strided(q.shape, (q.shape[1] * q.shape[2], q.shape[2], 1))
        super().forward(dense, k, v, cache, plan, out, **extras)


@fault("L2", _CAUSAL)
class KeysTakenForContiguous(LoopAttention):
    """The step's keys are written with dense strides, whatever their own are."""

    def _write(self, cache: Any, batch: AttentionBatch, k: Tensor, v: Tensor) -> None:
        super()._write(cache, batch, k.as_strided(k.shape, (k.shape[1] * k.shape[2], k.shape[2], 1)), v)


@fault("L2", _CAUSAL)
class QueryScaledInPlace(LoopAttention):
    """The caller's query is scaled in place."""

    def forward(self, q: Tensor, k: Any, v: Any, cache: Any, plan: Any, out: Tensor, **extras: Any) -> None:
        super().forward(q, k, v, cache, plan, out, **extras)
        q.mul_(self._scale())


@fault("L2", _CAUSAL)
class BlockTableClampedInPlace(LoopAttention):
    """Columns past a request's last block are set to 0 in the caller's table."""

    def _requests(self, batch: AttentionBatch) -> list[Request]:
        columns = torch.arange(batch.block_table.shape[1]) * batch.block_size
        batch.block_table.masked_fill_(columns >= batch.seq_lens[:, None], 0)
        return super()._requests(batch)


@fault("L2", _LSE)
class LseOfBaseTwo(LoopAttention):
    """The log-sum-exp is of base two, as kernels compute it."""

    def _store_lse(self, lse: Tensor, logsum: Tensor, request: Request) -> None:
        super()._store_lse(lse, logsum * 1.4426950408889634, request)


@fault("L2", _LSE)
class LseIsTheMaximum(SplitAttention):
    """Of several splits' sums the largest is returned."""

    def _merge(self, parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return super()._merge(parts, sinks)[0], torch.stack([logsum for _, logsum in parts]).amax(0)


@fault("L2", _LSE)
class LseOfHeadsFirst(LoopAttention):
    """The log-sum-exp of a prefill is stored as [H, T] where [T, H] is asked for."""

    def _store_lse(self, lse: Tensor, logsum: Tensor, request: Request) -> None:
        super()._store_lse(lse, logsum.T.reshape(logsum.shape), request)


@fault("L2", _LSE)
class LseOfEmptyRowElsewhere(LoopAttention):
    """A row without keys stores -inf where a dense batch would have it, over another request's."""

    def _requests(self, batch: AttentionBatch) -> list[Request]:
        self._empty = (batch.seq_lens == 0).nonzero().flatten().tolist()
        return super()._requests(batch)

    def _store_lse(self, lse: Tensor, logsum: Tensor, request: Request) -> None:
        super()._store_lse(lse, logsum, request)
        for row in self._empty:
            lse[(row + 1) % lse.shape[0]] = -torch.inf


@fault("L2", "test_attention.py::test_sinks_join_the_log_sum_exp")
class LseWithoutTheSink(LoopAttention):
    """The log-sum-exp leaves the sink out, while the output's denominator has it."""

    def _merge(self, parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return super()._merge(parts, sinks)[0], super()._merge(parts, None)[1]


# The cache is written.


@fault("L2", "test_attention.py::test_requests_share_a_block_of_the_step")
class WritesRowByRow(LoopAttention):
    """A request attends before the later ones have written: wrong where it shares a block that they write."""

    _pending: Any = None

    def _write(self, cache: Any, batch: AttentionBatch, k: Tensor, v: Tensor) -> None:
        self._pending = cache, k, v

    def forward(self, q: Tensor, k: Any, v: Any, cache: Any, plan: Any, out: Tensor, **extras: Any) -> None:
        self._pending = None
        super().forward(q, k, v, cache, plan, out, **extras)
        if k is not None:
            super()._write(cache, plan, k, v)

    def _gather(self, cache: Any, request: Request, at: Tensor) -> tuple[Tensor, Tensor]:
        if self._pending:
            blocks, offsets = (x[request.tokens] for x in self._slots(request.batch))
            for target, source in zip((cache.keys, cache.values), self._pending[1:], strict=True):
                target.index_put_((blocks, offsets), self._to_cache(source[request.tokens]))
        return super()._gather(cache, request, at)


@fault("L2", _CAUSAL)
class BlockSizeOfSixteen(LoopAttention):
    """Slots are split into block and offset as if blocks held 16 tokens."""

    def _slots(self, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
        size = min(16, batch.block_size)
        return batch.slots // size, batch.slots % size

    def _write(self, cache: Any, batch: AttentionBatch, k: Tensor, v: Tensor) -> None:
        blocks, offsets = self._slots(batch)
        blocks = blocks.clamp(max=cache.keys.shape[0] - 1)
        cache.keys[blocks, offsets], cache.values[blocks, offsets] = self._to_cache(k), self._to_cache(v)


@fault("L2", _CAUSAL)
class PaddingWritesBehindTheLastToken(LoopAttention):
    """Tokens that belong to no request are written behind the last one that does."""

    def _slots(self, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
        end, slots = int(batch.query_start[-1]), batch.slots.clone()
        slots[end:] = slots[max(0, end - 1)] + 1
        return slots // batch.block_size, slots % batch.block_size


@fault("L2", _CAUSAL)
class EmptyRowWritesItsTable(LoopAttention):
    """A padded row's token goes to the block that its stale table names, not to its slot."""

    def _slots(self, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
        blocks, offsets = super()._slots(batch)
        blocks = blocks.clone()
        for row in (batch.seq_lens == 0).nonzero().flatten().tolist():
            blocks[batch.query_start[row]] = batch.block_table[row].max().long()
        return blocks, offsets


@fault("L2", _CAUSAL)
class LastTokenOfAPrefillNotWritten(LoopAttention):
    """The last token of each prefill attends, and is not in the cache for the next step."""

    _undo: Any = None

    def _write(self, cache: Any, batch: AttentionBatch, k: Tensor, v: Tensor) -> None:
        blocks, offsets = self._slots(batch)
        last = (batch.query_start[1:] - 1).long()[batch.num_decodes :]
        blocks, offsets = blocks[last], offsets[last]
        kept = cache.keys[blocks, offsets].clone()
        super()._write(cache, batch, k, v)
        self._undo = (cache, blocks, offsets, kept) if len(last) else None

    def forward(self, q: Tensor, k: Any, v: Any, cache: Any, plan: Any, out: Tensor, **extras: Any) -> None:
        self._undo = None
        super().forward(q, k, v, cache, plan, out, **extras)
        if self._undo:
            target, blocks, offsets, kept = self._undo
            target.keys[blocks, offsets] = kept


@fault("L2", _CAUSAL)
class SharedCacheOverwritten(LoopAttention):
    """A layer that reads another's cache, and brings no keys, writes zeros there."""

    def forward(self, q: Tensor, k: Any, v: Any, cache: Any, plan: Any, out: Tensor, **extras: Any) -> None:
        super().forward(q, k, v, cache, plan, out, **extras)
        if k is None:
            blocks, offsets = self._slots(plan)
            cache.keys[blocks, offsets] = torch.zeros((), dtype=cache.keys.dtype)


@fault("L2", "test_attention.py::test_kv_dtypes")
class CacheCastThroughHalf(LoopAttention):
    """Keys pass through fp16 on their way into the cache."""

    def _to_cache(self, x: Tensor) -> Tensor:
        return x.half().to(self.spec.kv_dtype)


@fault("L2", "test_attention.py::test_kv_dtypes")
class CacheCastTruncates(LoopAttention):
    """Wider activations are cut off, not rounded, when they are written into a bf16 cache."""

    def _to_cache(self, x: Tensor) -> Tensor:
        if self.spec.kv_dtype is not torch.bfloat16:
            return super()._to_cache(x)
        return (x.float().contiguous().view(torch.int32) & -0x10000).view(torch.float32).bfloat16()


@fault("L2", "test_attention.py::test_fp8_writes[float8_e5m2]")
class Fp8Overflows(LoopAttention):
    """Numbers that are too large for a cache of 8 bits become infinity or NaN there."""

    def _to_cache(self, x: Tensor) -> Tensor:
        return x.to(self.spec.kv_dtype)


@fault("L2", "test_attention.py::test_fp8_writes[float8_e4m3fn]")
class Fp8CastTruncates(LoopAttention):
    """Keys and values are cut off, not rounded, when they are written into a cache of 8 bits."""

    def _to_cache(self, x: Tensor) -> Tensor:
        kept = super()._to_cache(x)
        if kept.itemsize > 1:
            return kept
        return (kept.view(torch.uint8) - (kept.float().abs() > x.float().abs()).byte()).view(kept.dtype)


@fault("L2", "test_attention.py::test_fp8_cache[float8_e4m3fn]")
class Fp8OwnKeysUnrounded(LoopAttention):
    """Prompts see the step's own keys and values as they came, which a later chunk, or a prefix hit, cannot."""

    _own: tuple[Tensor, Tensor] | None = None

    def forward(self, q: Tensor, k: Any, v: Any, cache: Any, plan: Any, out: Tensor, **extras: Any) -> None:
        self._own = None if k is None or self.spec.kv_dtype.itemsize > 1 else (k, v)
        super().forward(q, k, v, cache, plan, out, **extras)

    def _gather(self, cache: Any, request: Request, at: Tensor) -> tuple[Tensor, Tensor]:
        held = super()._gather(cache, request, at)
        if self._own is not None and not request.is_decode:
            for kept, came in zip(held, self._own, strict=True):
                kept[at >= request.length - request.num_queries] = came[request.tokens].float()
        return held


@fault("L2", "test_attention.py::test_fp8_writes[float8_e4m3fn]")
class Fp8OfAnotherFlavour(LoopAttention):
    """A cache of e4m3fn is written and read as e4m3fnuz: consistent, and wrong for whoever else reads its blocks."""

    def _to_cache(self, x: Tensor) -> Tensor:
        if self.spec.kv_dtype is not torch.float8_e4m3fn:
            return super()._to_cache(x)
        return to_cache(x, torch.float8_e4m3fnuz).view(torch.float8_e4m3fn)

    def _gather(self, cache: Any, request: Request, at: Tensor) -> tuple[Tensor, Tensor]:
        if self.spec.kv_dtype is torch.float8_e4m3fn:
            cache = replace(cache, **{n: getattr(cache, n).view(torch.float8_e4m3fnuz) for n in ("keys", "values")})
        return super()._gather(cache, request, at)


@fault("L2", _CAUSAL)
class PrefillWritesKeysAsValues(LoopAttention):
    """On the path of prefills the cache's values are written from the keys."""

    def _write(self, cache: Any, batch: AttentionBatch, k: Tensor, v: Tensor) -> None:
        super()._write(cache, batch, k, v)
        if batch.num_decodes == 0 and self.spec.head_dim == self.spec.v_head_dim:
            super()._write(cache, batch, k, k)


@fault("L2", _CAUSAL)
class WritesTheNextHead(LoopAttention):
    """The last key/value head's keys are written with the first head's offset where there are three."""

    def _write(self, cache: Any, batch: AttentionBatch, k: Tensor, v: Tensor) -> None:
        super()._write(cache, batch, k.roll(1, 1) if k.shape[1] == 3 else k, v)


# What was promised of bits.


@fault("L2", "test_attention.py::test_same_call_gives_the_same_bits")
class MergesInTheOrderOfArrival(SplitAttention):
    """Splits are added in the order in which they happen to end, and `deterministic` is declared."""

    _arrivals = itertools.count()

    def _merge(self, parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        turn = next(self._arrivals) % len(parts)
        return super()._merge(parts[turn:] + parts[:turn], sinks)

    def _round(self, x: Tensor) -> Tensor:
        return (x.half() if self.spec.dtype is torch.bfloat16 and next(self._arrivals) % 2 else x).to(self.spec.dtype)


@fault("L2", "test_attention.py::test_batch_invariant", batch_invariant=True)
class SplitsByTheSizeOfTheBatch(SplitAttention):
    """How many splits a request gets depends on how many others there are, and `batch_invariant` is declared."""

    def _splits(self, request: Request) -> list[slice]:
        step = 8 * request.batch.num_requests
        return [slice(i, i + step) for i in range(0, request.length, step)]

    def _merge(self, parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return super()._merge([(out.to(self.spec.dtype).float(), logsum) for out, logsum in parts], sinks)


@fault("L2", "test_attention.py::test_many_rows")
class WorkspaceOfTheFirstCall(LoopAttention):
    """The workspace keeps the first call's size, and later requests that are longer lose what does not fit."""

    _held: int = 0

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        cls = type(self)
        cls._held = cls._held or request.length
        return super()._sees(query, key, request) & ((key < cls._held) | (key == query))
