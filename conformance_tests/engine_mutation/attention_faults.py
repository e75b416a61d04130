"""Attention that sees the wrong keys: masks, lengths, block tables, heads, scales and the optional features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine_mutation.catalogue import fault
from engine_mutation.loop import LoopAttention, Request, SplitAttention
from engine_sdk import AttentionBatch, AttentionSpec

_AGREES = "test_attention.py::test_agrees_with_reference"
_CAUSAL = f"{_AGREES}[causal]"
_WINDOW = f"{_AGREES}[sliding_window]"

# The causal mask, and the lengths.


@fault("L2", _CAUSAL)
class CausalOneAhead(LoopAttention):
    """A query sees the key after its own."""

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        return super()._sees(query + 1, key, request)


@fault("L2", _CAUSAL)
class TopLeftMask(LoopAttention):
    """The causal mask is aligned with the first key instead of the last: wrong for a chunk after a prefix."""

    def _query_positions(self, request: Request) -> Tensor:
        return super()._query_positions(request) if request.is_decode else torch.arange(request.num_queries)


@fault("L2", _CAUSAL)
class LastKeyDropped(LoopAttention):
    """A query does not see its own key, unless it has no other."""

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        return super()._sees(query, key, request) & ((key != query) | (query == 0))


@fault("L2", _CAUSAL)
class FirstKeyDropped(LoopAttention):
    """The first key is skipped once there are others."""

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        return super()._sees(query, key, request) & ((key != 0) | (query == 0))


@fault("L2", _CAUSAL)
class AttendsPastTheEnd(LoopAttention):
    """A decode sees one key after its own, which is a stale one or the next block's."""

    def _key_positions(self, request: Request) -> Tensor:
        return torch.arange(request.length + request.is_decode)

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        return super()._sees(query + request.is_decode, key, request)


@fault("L2", _CAUSAL)
class BlockTailUnmasked(LoopAttention):
    """A decode attends to whole blocks, what lies after its last token included."""

    def _key_positions(self, request: Request) -> Tensor:
        size = request.batch.block_size
        return torch.arange(-(-request.length // size) * size if request.is_decode else request.length)

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        whole = query // request.batch.block_size * request.batch.block_size + request.batch.block_size - 1
        return super()._sees(whole if request.is_decode else query, key, request)


@fault("L2", _CAUSAL)
class LongestLengthForAll(LoopAttention):
    """Every decode is masked with the length of the batch's longest request."""

    def _requests(self, batch: AttentionBatch) -> list[Request]:
        return [replace(r, length=batch.max_seq_len if r.is_decode else r.length) for r in super()._requests(batch)]


@fault("L2", _CAUSAL)
class PrefixIgnored(LoopAttention):
    """The keys' length of a chunk is its queries' length, so what was computed before is not seen."""

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        own = key >= request.length - request.num_queries
        return super()._sees(query, key, request) & (own | torch.tensor(request.is_decode))


@fault("L2", "test_attention.py::test_long_rows")
class SecondTileOfQueriesRestarts(LoopAttention):
    """The mask of a prefill counts rows within a tile of 128 queries, so it is right in the first tile only."""

    def _query_positions(self, request: Request) -> Tensor:
        return request.length - request.num_queries + torch.arange(request.num_queries) % 128


@fault("L2", "test_attention.py::test_long_rows")
class KeysBeyond2048Dropped(LoopAttention):
    """The grid has room for 2048 keys, and a longer request loses the rest."""

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        return super()._sees(query, key, request) & (key >= query - 2047)


@fault("L2", "test_attention.py::test_very_long_rows")
class KeysBeyond8192Dropped(LoopAttention):
    """The splits' scratch memory has room for 8192 keys, and a longer request loses the first ones."""

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        return super()._sees(query, key, request) & (key >= query - 8191)


@fault("L2", "test_attention.py::test_many_rows")
class RowsBeyondATileRepeat(LoopAttention):
    """Rows of a batch are taken in tiles of 64, and the last tile, which is not full, reads the first rows' tables."""

    def _table(self, request: Request) -> Tensor:
        full = request.batch.num_requests // 64 * 64
        index = request.index if request.index < full or not full else request.index - full
        return request.batch.block_table[index].long()


@fault("L2", _CAUSAL)
class EmptyRowFails(LoopAttention):
    """A padded row of length 0 divides by zero."""

    def _requests(self, batch: AttentionBatch) -> list[Request]:
        1 / batch.seq_lens.min().item()
        return super()._requests(batch)


# The block table.


@fault("L2", _CAUSAL)
class NeighboursTable(LoopAttention):
    """Row i reads through the block table of row i - 1."""

    def _table(self, request: Request) -> Tensor:
        return request.batch.block_table[max(0, request.index - 1)].long()


@fault("L2", _CAUSAL)
class ContiguousBlocks(LoopAttention):
    """A request's blocks are taken to follow its first one in memory."""

    def _table(self, request: Request) -> Tensor:
        return super()._table(request)[0] + torch.arange(request.batch.block_table.shape[1])

    def _gather(self, cache: Any, request: Request, at: Tensor) -> tuple[Tensor, Tensor]:
        size = request.batch.block_size
        blocks = self._table(request)[at // size].clamp(max=cache.keys.shape[0] - 1)
        return cache.keys[blocks, at % size].float(), cache.values[blocks, at % size].float()


@fault("L2", _CAUSAL)
class BlockIdOf8Bits(LoopAttention):
    """Block ids are kept in a byte."""

    def _table(self, request: Request) -> Tensor:
        return super()._table(request) & 0xFF


@fault("L2", "test_attention.py::test_block_ids_are_wide")
class BlockIdOf16Bits(LoopAttention):
    """Block ids are kept in 16 bits."""

    def _table(self, request: Request) -> Tensor:
        return super()._table(request) & 0xFFFF


@fault("L2", "test_attention.py::test_block_offsets_are_wide")
class OffsetOf31Bits(LoopAttention):
    """The offset of a block in the pool, in elements, overflows 32 bits: wrong beyond four billion bytes of bf16."""

    _pitch: int

    def _table(self, request: Request) -> Tensor:
        stride = self._pitch // self.spec.kv_dtype.itemsize
        return (((super()._table(request) * stride + 2**31) % 2**32) - 2**31) // stride

    def _gather(self, cache: Any, request: Request, at: Tensor) -> tuple[Tensor, Tensor]:
        self._pitch = cache.keys.stride(0) * cache.keys.itemsize
        return super()._gather(cache, request, at)


@fault("L2", _CAUSAL)
class FirstBlockForWhole(LoopAttention):
    """From the third block on the table's second entry is read again."""

    def _table(self, request: Request) -> Tensor:
        table = super()._table(request)
        return table[torch.arange(len(table)).clamp(max=1)]


@fault("L2", _CAUSAL)
class StaleColumnsRead(LoopAttention):
    """All columns of the table are gathered, and those past the request's blocks are weighed with zero: NaN there."""

    def _key_positions(self, request: Request) -> Tensor:
        return torch.arange(request.batch.block_table.shape[1] * request.batch.block_size)

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        return super()._sees(query, key, request) & (key < request.length)

    def _clear(self, keys: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values


@fault("L2", _CAUSAL)
class PlanOfTheFirstStep(LoopAttention):
    """The plan is kept and handed out again for a step of as many requests and tokens."""

    _kept: ClassVar[dict[tuple[int, int], AttentionBatch]] = {}

    def plan(self, batch: AttentionBatch) -> Any:
        key = (batch.num_requests, batch.num_tokens)
        return type(self)._kept.setdefault(key, batch)


@fault("L2", "test_attention.py::test_plan_serves_all_layers")
class PlanOfTheNewestStep(LoopAttention):
    """The plan lives in the backend, so a later step's plan is used for an earlier one's layers."""

    def plan(self, batch: AttentionBatch) -> Any:
        type(self)._newest = batch  # type: ignore[attr-defined]
        return None

    def forward(self, q: Tensor, k: Any, v: Any, cache: Any, plan: Any, out: Tensor, **extras: Any) -> None:
        super().forward(q, k, v, cache, type(self)._newest, out, **extras)  # type: ignore[attr-defined]


# Heads and scale.


@fault("L2", _CAUSAL)
class HeadsInterleaved(LoopAttention):
    """Query head h reads key/value head h % K instead of h // (H // K)."""

    def _kv_head(self, head: Tensor) -> Tensor:
        return head % self.spec.num_kv_heads


@fault("L2", _CAUSAL)
class GroupRoundedToAPowerOfTwo(LoopAttention):
    """A group of 7 query heads is taken for one of 8."""

    def _kv_head(self, head: Tensor) -> Tensor:
        group = self.spec.num_heads // self.spec.num_kv_heads
        return head // (1 << (group - 1).bit_length())


@fault("L2", _CAUSAL)
class ScaleOfPaddedHeadSize(LoopAttention):
    """The scale is that of the head size padded to a power of two: wrong for 80."""

    def _scale(self) -> float:
        dim = self.spec.head_dim
        return float(self.spec.scale * (dim / (1 << (dim - 1).bit_length())) ** 0.5)


@fault("L2", _CAUSAL)
class ScaleFromHeadSize(LoopAttention):
    """The scale of the layer is ignored, and one over the root of the head size taken."""

    def _scale(self) -> float:
        return float(self.spec.head_dim**-0.5)


@fault("L2", _CAUSAL)
class TrailingHeadDimsDropped(LoopAttention):
    """The product of query and key stops at a multiple of 32: wrong for 80."""

    def _products(self, q: Tensor, keys: Tensor) -> Tensor:
        dim = max(16, q.shape[-1] // 32 * 32)
        return super()._products(q[..., :dim], keys[..., :dim])


@fault("L2", _CAUSAL)
class PaddedHeadReadsItsNeighbour(LoopAttention):
    """A head of 80 is read as 128 wide, with zeros in the query: what follows in memory may be NaN."""

    def _gather(self, cache: Any, request: Request, at: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super()._gather(cache, request, at)
        padded = 1 << (self.spec.head_dim - 1).bit_length()
        wide = cache.keys.as_strided((*cache.keys.shape[:3], padded), cache.keys.stride(), cache.keys.storage_offset())
        beyond = wide[self._table(request)[at // request.batch.block_size], at % request.batch.block_size]
        return keys + (beyond[..., self.spec.head_dim :].float() * 0).sum(-1, keepdim=True), values


# Sliding windows and chunks.


@fault("L2", _WINDOW)
class WindowOneWider(LoopAttention):
    """A query sees `window` keys before its own."""

    def __init__(self, spec: AttentionSpec, declared: Any) -> None:
        super().__init__(replace(spec, window=spec.window and spec.window + 1), declared)


@fault("L2", _WINDOW)
class WindowOneNarrower(LoopAttention):
    """A query sees `window` - 1 keys, its own included, but at least its own."""

    def __init__(self, spec: AttentionSpec, declared: Any) -> None:
        super().__init__(replace(spec, window=spec.window and max(1, spec.window - 1)), declared)


@fault("L2", _WINDOW)
class WindowOfWholeBlocks(LoopAttention):
    """The window begins at the start of the block that it begins in."""

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        window, size = self.spec.window, request.batch.block_size
        seen = super()._sees(query, key, request)
        return (
            seen
            if window is None
            else seen | ((key <= query) & (key >= (query - window + 1).clamp(min=0) // size * size))
        )


@fault("L2", _WINDOW)
class WindowIgnoredByDecodes(LoopAttention):
    """Only prefills know the window."""

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        return key <= query if request.is_decode and self.spec.causal else super()._sees(query, key, request)


@fault("L2", _WINDOW)
class WindowOfTheLastQuery(LoopAttention):
    """All queries of a prefill begin to see where the last one does."""

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        last = super()._sees(query[-1:], key, request)
        return super()._sees(query, key, request) & (last | (key == query))


@fault("L2", _WINDOW)
class ValuesLeftOfTheWindowKept(LoopAttention):
    """Keys before the window are cleared, and values are not: a weight of zero does not stop NaN."""

    def _clear(self, keys: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        return super()._clear(keys, values, seen)[0], values


@fault("L2", _WINDOW)
class WindowedDecodeUnwritten(LoopAttention):
    """With a window, the output of decodes never reaches the caller's tensor."""

    def _store(self, out: Tensor, attended: Tensor, request: Request) -> None:
        if self.spec.window is None or not request.is_decode:
            super()._store(out, attended, request)


@fault("L2", f"{_AGREES}[chunked]")
class ChunkedAsSlidingWindow(LoopAttention):
    """A chunk's length is taken for a window's."""

    def __init__(self, spec: AttentionSpec, declared: Any) -> None:
        super().__init__(replace(spec, window=spec.chunk or spec.window, chunk=None), declared)


@fault("L2", f"{_AGREES}[chunked]")
class ChunksFromTheFirstNewToken(LoopAttention):
    """Chunks are counted from the step's first token instead of the request's."""

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        chunk, start = self.spec.chunk, request.length - request.num_queries
        if chunk is None:
            return super()._sees(query, key, request)
        return (key <= query) & ((key - start) // chunk == (query - start) // chunk)


# Softcap, sinks, ALiBi, other value sizes, both directions.


@fault("L2", f"{_AGREES}[softcap]")
class SoftcapIgnored(LoopAttention):
    """Scores are not capped."""

    def _cap(self, scores: Tensor) -> Tensor:
        return scores


@fault("L2", f"{_AGREES}[softcap]")
class SoftcapBeforeTheScale(LoopAttention):
    """The cap is applied to products that are not scaled yet."""

    def _scores(self, q: Tensor, keys: Tensor) -> Tensor:
        return self._cap(self._products(q, keys)) * self._scale()


@fault("L2", f"{_AGREES}[softcap]")
class SoftcapAfterTheMask(LoopAttention):
    """The mask's -inf is capped too, so that hidden keys keep a little weight."""

    def _mask(self, scores: Tensor, seen: Tensor) -> Tensor:
        return self._cap(super()._mask(scores, seen))


@fault("L2", f"{_AGREES}[softcap]")
class SoftcapNotMultipliedBack(LoopAttention):
    """tanh(s / c) without the factor c."""

    def _cap(self, scores: Tensor) -> Tensor:
        return scores if self.spec.softcap is None else torch.tanh(scores / self.spec.softcap)


@fault("L2", f"{_AGREES}[sinks]")
class SinkDropped(LoopAttention):
    """Sinks do not join the denominator."""

    def _merge(self, parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return super()._merge(parts, None)


@fault("L2", f"{_AGREES}[sinks]")
class SinkScaled(LoopAttention):
    """The sink's logit is scaled as if it were a product."""

    def _merge(self, parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return super()._merge(parts, None if sinks is None else sinks * self._scale())


@fault("L2", f"{_AGREES}[sinks]")
class SinkInEverySplit(SplitAttention):
    """Each split counts the sink, and the merge adds them up."""

    def _merge(self, parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return super()._merge(parts, None if sinks is None else sinks + torch.tensor(float(len(parts))).log())


@fault("L2", f"{_AGREES}[sinks]")
class SinkOfTheFirstHead(LoopAttention):
    """All heads share the first head's sink."""

    def _merge(self, parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return super()._merge(parts, None if sinks is None else sinks[:1].expand_as(sinks))


@fault("L2", f"{_AGREES}[alibi]")
class AlibiOfTheKeyHead(LoopAttention):
    """Slopes are taken by key/value head, not by query head."""

    def _bias(self, slopes: Tensor, distance: Tensor) -> Tensor:
        return super()._bias(slopes[self._kv_head(torch.arange(len(slopes)))], distance)


@fault("L2", f"{_AGREES}[alibi]")
class AlibiUnscaledSign(LoopAttention):
    """The bias grows with the distance."""

    def _bias(self, slopes: Tensor, distance: Tensor) -> Tensor:
        return super()._bias(slopes, -distance)


@fault("L2", f"{_AGREES}[alibi]")
class AlibiScaled(LoopAttention):
    """The bias is multiplied by the scale of the scores."""

    def _bias(self, slopes: Tensor, distance: Tensor) -> Tensor:
        return super()._bias(slopes * self._scale(), distance)


@fault("L2", f"{_AGREES}[v_head_dim]")
class ValueSizeOfTheKeys(LoopAttention):
    """Values are read as wide as keys are, where they are wider; the rest stays zero."""

    def _sum(self, weights: Tensor, values: Tensor) -> Tensor:
        attended = super()._sum(weights, values)
        attended[..., self.spec.head_dim :] = 0
        return attended


@fault("L2", f"{_AGREES}[bidirectional]")
class BidirectionalIsCausal(LoopAttention):
    """A layer that is not causal is masked as if it were."""

    def __init__(self, spec: AttentionSpec, declared: Any) -> None:
        super().__init__(replace(spec, causal=True), declared)


@fault("L2", f"{_AGREES}[bidirectional]")
class BidirectionalOverTheStepOnly(LoopAttention):
    """A layer that is not causal sees the step's tokens, and not the prefix."""

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        seen = super()._sees(query, key, request)
        return seen if self.spec.causal else seen & (key >= request.length - request.num_queries)


@fault("L2", f"{_AGREES}[two_sided_window]")
class TwoSidedWindowReachesAheadWithoutEnd(LoopAttention):
    """A window on both sides ends before the query, and not behind it."""

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        if self.spec.causal or self.spec.window is None:
            return super()._sees(query, key, request)
        return (key > query - self.spec.window) & (key < request.length)


@fault("L2", f"{_AGREES}[two_sided_window]")
class TwoSidedWindowIsInclusive(LoopAttention):
    """A window on both sides has one key more ahead."""

    def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
        seen = super()._sees(query, key, request)
        return seen if self.spec.causal or self.spec.window is None else seen | (key == query + self.spec.window)


@fault("L2", f"{_AGREES}[relative_bias]")
class RelativeBiasReversed(LoopAttention):
    """The bias by distance is that of the query from the key."""

    def _bias(self, slopes: Tensor, distance: Tensor) -> Tensor:
        return super()._bias(slopes, distance if self.spec.relative is None else -distance)


@fault("L2", f"{_AGREES}[relative_bias]")
class RelativeBiasEndsEarly(LoopAttention):
    """The last entries of the table of biases are never used."""

    def _bias(self, slopes: Tensor, distance: Tensor) -> Tensor:
        last = (self.spec.relative or 1) - 1
        return super()._bias(slopes, distance if self.spec.relative is None else distance.clamp(-last, last))
