"""Paged attention in plain torch: every feature of the contract, on any device that torch drives.

The cache is written first. Then the step is cut into tiles of bounded size; a tile gathers the blocks of its requests
into a workspace that all layers reuse, and attends there:

    decode     several requests of similar length     q [b, K, G, 1, D]   keys [b, K, L, D]
    prefill    one request, a slice of its queries     q [1, K, G, T, D]   keys [1, K, L, D]

G = H // K query heads share a key/value head; L keys; T queries; the other letters are those of
`engine.interfaces.attention`. Positions that a tile gathers and no query sees are cleared, so that NaN there stays
there. Lengths are read from host tensors only: nothing here waits for an accelerator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import UnsupportedCapability
from engine.interfaces import (
    ATTENTION_FEATURES,
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    Capabilities,
    KVCache,
    KVLayout,
    Plan,
    Verdict,
)
from engine_sdk.layout import PagedLayout, TokenMajor, as_bits

# Bytes of keys and values that a decode tile gathers: on a host they should stay in its caches.
_HOST_TILE_BYTES = 1 << 20
_DEVICE_TILE_BYTES = 256 << 20
# Scores that a prefill slice may need in memory at once, heads included.
_HOST_SCORES = 1 << 24
_DEVICE_SCORES = 1 << 26


@dataclass(frozen=True)
class _Decode:
    """Requests with one query token each, gathered together.

    rows int64 [b], their tokens; blocks int64 [b * n], gathered; of the n * B gathered positions of a request those in
    ``[begin, end)`` are used; visible bool [b, L], and distance [b, L] of each key from its query, None where not
    needed; of the L used positions, those outside ``[full_begin, full_end)`` are hidden from some request.
    """

    rows: Tensor
    blocks: Tensor
    begin: int
    end: int
    full_begin: int
    full_end: int
    visible: Tensor | None
    distance: Tensor | None


@dataclass(frozen=True)
class _Slice:
    """Queries at positions ``[begin, end)`` of a request, which see keys in ``[low, high)``.

    triangular: query ``begin + i`` sees exactly the keys up to ``low + i``; everything: all of them.
    """

    begin: int
    end: int
    low: int
    high: int
    triangular: bool
    everything: bool


@dataclass(frozen=True)
class _Prefill:
    """A request with several query tokens, the first at `token` in the step and at `start` in the request.

    blocks int64 [n] hold positions from `origin` on, through the last.
    """

    token: int
    start: int
    origin: int
    blocks: Tensor
    slices: list[_Slice]


@dataclass(frozen=True)
class _Plan:
    layout: PagedLayout
    blocks: Tensor  # int64 [N]: where each token is written
    offsets: Tensor  # int64 [N]
    decodes: list[_Decode]
    prefills: list[_Prefill]


class TorchAttention(AttentionBackend):
    """Paged attention in plain torch.

    Plain softmax goes to `scaled_dot_product_attention`. Softcap, sinks, ALiBi and the log-sum-exp need the scores
    themselves, which are then made in fp32. Requests without keys (padding) leave their output as it was.

    Args:
        spec: what to compute.
        layout: how blocks are stored: a `PagedLayout`, called as ``layout(B, K, D, E, kv_dtype)``.
        declared: the platform's capabilities, so that what it did not declare is refused here too.
    """

    features = ATTENTION_FEATURES

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        layout: Callable[[int, int, int, int, torch.dtype], PagedLayout] = TokenMajor,
        declared: Capabilities | None = None,
    ) -> None:
        super().__init__(spec)
        self._make_layout = layout
        self._layouts: dict[int, PagedLayout] = {}
        self._declared = declared or Capabilities(attention=self.features)
        self._by_distance = spec.alibi or spec.relative is not None
        self._needs_scores = spec.softcap is not None or spec.sinks or self._by_distance
        self._keys = _Workspace()
        self._values = _Workspace()

    @classmethod
    def supports(cls, spec: AttentionSpec) -> Verdict:
        """Everything that the contract defines."""
        if not spec.causal and spec.chunk is not None:
            return Verdict.no("a chunk without a causal mask is not defined; drop one of them")
        if spec.relative is not None and (spec.causal or spec.alibi):
            return Verdict.no("a bias by distance needs causal=False, and excludes ALiBi")
        return super().supports(spec)

    def layout(self, block_size: int) -> KVLayout:
        """Blocks of `block_size` tokens."""
        if block_size not in self._declared.block_sizes:
            raise UnsupportedCapability("block_sizes", block_size, f"declared: {self._declared.block_sizes}")
        return self._layout(block_size)

    def _layout(self, block_size: int) -> PagedLayout:
        if block_size not in self._layouts:
            spec = self.spec
            self._layouts[block_size] = self._make_layout(
                block_size, spec.num_kv_heads, spec.head_dim, spec.v_head_dim, spec.kv_dtype
            )
        return self._layouts[block_size]

    # Planning: once a step.

    def plan(self, batch: AttentionBatch) -> Plan:
        """Cut the step into tiles."""
        slots, block_size = batch.slots, batch.block_size
        blocks = torch.div(slots, block_size, rounding_mode="floor")
        decodes = list(self._plan_decodes(batch)) if batch.num_decodes else []
        prefills = list(self._plan_prefills(batch)) if batch.num_decodes < batch.num_requests else []
        return _Plan(self._layout(block_size), blocks, slots - blocks * block_size, decodes, prefills)

    def _plan_decodes(self, batch: AttentionBatch) -> Iterator[_Decode]:
        spec, size, count = self.spec, batch.block_size, batch.num_decodes
        device = batch.seq_lens.device
        # The same stable sort on both sides, so that the order need not be copied to the device.
        lengths_host = batch.seq_lens_host[:count].sort(stable=True).values
        lengths, order = batch.seq_lens[:count].sort(stable=True)
        lows_host = _low(spec, lengths_host - 1)
        firsts_host = lows_host // size
        first_blocks = _low(spec, lengths - 1) // size
        # Per request: the used part [begin, end) of what its blocks hold.
        begins = (lows_host - firsts_host * size).tolist()
        ends = (lengths_host - firsts_host * size).tolist()

        token_bytes = spec.num_kv_heads * (spec.head_dim + spec.v_head_dim) * spec.kv_dtype.itemsize
        budget = (_HOST_TILE_BYTES if device.type == "cpu" else _DEVICE_TILE_BYTES) // token_bytes
        for tile in _tiles(ends, int((lengths_host <= 0).sum()), budget):
            begin, end = min(begins[tile]), max(ends[tile])
            full_begin, full_end = max(begins[tile]) - begin, min(ends[tile]) - begin

            columns = first_blocks[tile, None] + torch.arange(-(-end // size), device=device)
            # Columns past a request's last block may hold anything.
            table = batch.block_table[order[tile, None], columns.clamp(max=batch.block_table.shape[1] - 1)]
            blocks = torch.where(columns * size < lengths[tile, None], table, 0).flatten()

            ragged = full_begin > 0 or full_end < end - begin
            visible = distance = None
            if ragged or self._by_distance:
                last = lengths[tile, None] - 1
                keys = first_blocks[tile, None] * size + torch.arange(begin, end, device=device)
                visible = (keys <= last) & (keys >= _low(spec, last)) if ragged else None
                distance = keys - last if self._by_distance else None
            yield _Decode(order[tile], blocks, begin, end, full_begin, full_end, visible, distance)

    def _plan_prefills(self, batch: AttentionBatch) -> Iterator[_Prefill]:
        size, count = batch.block_size, batch.num_decodes
        tokens = batch.query_start_host.tolist()
        lengths = batch.seq_lens_host.tolist()
        for request in range(count, batch.num_requests):
            token, length = tokens[request], lengths[request]
            num_queries = tokens[request + 1] - token
            if num_queries <= 0 or length <= 0:
                continue
            start = length - num_queries
            slices = list(self._slices(start, length, batch.slots.device.type == "cpu"))
            first_block = slices[0].low // size
            blocks = batch.block_table[request, first_block : -(-length // size)]
            yield _Prefill(token, start, first_block * size, blocks, slices)

    def _slices(self, start: int, length: int, host: bool) -> Iterator[_Slice]:
        """Cut the queries at positions ``[start, length)`` so that the scores of a slice stay bounded."""
        spec = self.spec
        step = max(1, (_HOST_SCORES if host else _DEVICE_SCORES) // (spec.num_heads * length))
        reach = min(spec.window or length, spec.chunk or length)
        if reach < length:  # long slices would gather scores outside every query's reach
            step = min(step, max(reach, 128))
        begins = torch.arange(start, length, step)
        lasts = (begins + step).clamp(max=length) - 1
        for begin, last, low, last_low in zip(
            begins.tolist(), lasts.tolist(), _low(spec, begins).tolist(), _low(spec, lasts).tolist(), strict=True
        ):
            if spec.causal:
                triangular = begin == low == last_low
                yield _Slice(begin, last + 1, low, last + 1, triangular, begin == last)
            else:
                high = length if spec.window is None else min(length, last + spec.window)
                yield _Slice(begin, last + 1, low, high, False, last_low == 0 and high - begin <= (spec.window or high))

    # Computing: once a layer.

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
        if lse is not None and "lse" not in self._declared.attention:
            raise UnsupportedCapability("lse", True, f"declared: {sorted(self._declared.attention)}")
        if k is not None and v is not None:
            plan.layout.write(cache, plan.blocks, plan.offsets, k, v)
        extras = _Extras(sinks, alibi_slopes, lse is not None)
        for decode in plan.decodes:
            attended, logsum = self._decode(q, cache, plan.layout, decode, extras)
            out.index_copy_(0, decode.rows, attended)
            if lse is not None and logsum is not None:
                lse.index_copy_(0, decode.rows, logsum)
        for prefill in plan.prefills:
            self._prefill(q, k, v, cache, plan.layout, prefill, out, extras, lse)

    def _gather(self, cache: KVCache, layout: PagedLayout, blocks: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """What `blocks` [b * n] of b requests hold, in order: [b, n * B, K, D or E], valid until the next call."""
        shape = (blocks.shape[0], layout.block_size, layout.num_kv_heads)
        keys = self._keys.take((*shape, layout.head_dim), layout.kv_dtype, blocks.device)
        values = self._values.take((*shape, layout.v_head_dim), layout.kv_dtype, blocks.device)
        layout.gather(cache, blocks, keys, values)
        return keys.view(num, -1, *keys.shape[2:]), values.view(num, -1, *values.shape[2:])

    def _decode(
        self, q: Tensor, cache: KVCache, layout: PagedLayout, tile: _Decode, extras: _Extras
    ) -> tuple[Tensor, Tensor | None]:
        spec, num = self.spec, tile.rows.shape[0]
        keys, values = (x[:, tile.begin : tile.end] for x in self._gather(cache, layout, tile.blocks, num))
        visible = tile.visible
        if visible is not None:
            for part in (slice(0, tile.full_begin), slice(tile.full_end, None)):
                hidden = ~visible[:, part, None, None]
                as_bits(keys[:, part]).masked_fill_(hidden, 0)
                as_bits(values[:, part]).masked_fill_(hidden, 0)
        queries = q.index_select(0, tile.rows).view(num, spec.num_kv_heads, -1, 1, spec.head_dim)
        attended, logsum = self._attend(
            queries,
            keys.transpose(1, 2).to(q.dtype),
            values.transpose(1, 2).to(q.dtype),
            extras,
            visible=None if visible is None else visible[:, None],
            distance=None if tile.distance is None else tile.distance[:, None],
        )
        return attended.reshape(num, spec.num_heads, spec.v_head_dim), None if logsum is None else logsum.flatten(1)

    def _prefill(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: KVCache,
        layout: PagedLayout,
        request: _Prefill,
        out: Tensor,
        extras: _Extras,
        lse: Tensor | None,
    ) -> None:
        spec = self.spec
        group = spec.num_heads // spec.num_kv_heads
        scored = self._needs_scores or extras.lse
        end = request.slices[-1].end
        if k is not None and v is not None and request.slices[0].low >= request.start and spec.kv_dtype == spec.dtype:
            # All that the queries see was made in this step.
            origin, tokens = request.start, slice(request.token, request.token + end - request.start)
            keys, values = k[tokens], v[tokens]
        else:
            origin = request.origin
            keys, values = (x[0].to(q.dtype) for x in self._gather(cache, layout, request.blocks, 1))
        for part in request.slices:
            rows = slice(request.token + part.begin - request.start, request.token + part.end - request.start)
            seen = slice(part.low - origin, part.high - origin)
            visible = distance = None
            masked = not part.everything and (scored or not part.triangular)
            if masked or self._by_distance:
                at = torch.arange(part.begin, part.end, device=q.device)[:, None]
                keys_at = torch.arange(part.low, part.high, device=q.device)
                upper = at if spec.causal else at + (spec.window or request.slices[-1].high) - 1
                visible = ((keys_at <= upper) & (keys_at >= _low(spec, at)))[None] if masked else None
                distance = (keys_at - at)[None] if self._by_distance else None
            attended, logsum = self._attend(
                q[rows].view(-1, spec.num_kv_heads, group, spec.head_dim).permute(1, 2, 0, 3)[None],
                keys[None, seen].transpose(1, 2),
                values[None, seen].transpose(1, 2),
                extras,
                visible=visible,
                distance=distance,
                triangular=part.triangular,
            )
            out[rows].view(-1, spec.num_kv_heads, group, spec.v_head_dim).copy_(attended[0].permute(2, 0, 1, 3))
            if lse is not None and logsum is not None:
                lse[rows] = logsum[0].flatten(0, 1).T

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extras: _Extras,
        *,
        visible: Tensor | None,
        distance: Tensor | None,
        triangular: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within a tile.

        Args:
            q: [b, K, G, T, D]; T is 1 or b is 1.
            k: [b, K, L, D].
            v: [b, K, L, E].
            extras: what the layer adds to plain softmax.
            visible: bool [b, T, L], or None: every query sees every key.
            distance: [b, T, L], key position minus query position; given for ALiBi.
            triangular: `visible` is the lower triangle, which some kernels know without reading it.

        Returns:
            [b, K, G, T, E], and the log-sum-exp, fp32 [b, K, G, T], where it was asked for.
        """
        if self._needs_scores or extras.lse:
            return self._attend_by_scores(q, k, v, extras, visible=visible, distance=distance)
        mask = None if triangular else visible
        if q.shape[3] == 1:
            mask = None if mask is None else mask[:, None]
            return F.scaled_dot_product_attention(q.squeeze(3), k, v, mask, scale=self.spec.scale).unsqueeze(3), None
        group = q.shape[2]
        q, k, v = q[0], k[0, :, None].expand(-1, group, -1, -1), v[0, :, None].expand(-1, group, -1, -1)
        mask = None if mask is None else mask[0]
        attended = F.scaled_dot_product_attention(q, k, v, mask, is_causal=triangular, scale=self.spec.scale)
        return attended[None], None

    def _attend_by_scores(
        self, q: Tensor, k: Tensor, v: Tensor, extras: _Extras, *, visible: Tensor | None, distance: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        spec = self.spec
        scores = (q.flatten(2, 3).float() * spec.scale) @ k.float().transpose(-1, -2)
        scores = scores.view(*q.shape[:4], -1)  # [b, K, G, T, L]
        per_head = (spec.num_kv_heads, -1, 1, 1)
        if spec.softcap is not None:
            scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
        if extras.alibi_slopes is not None and distance is not None:
            if (r := spec.relative) is not None:
                table = extras.alibi_slopes.float().view(spec.num_kv_heads, -1, 2 * r + 1)
                scores += table[:, :, distance.clamp(-r, r) + r].permute(2, 0, 1, 3, 4)
            else:
                scores += extras.alibi_slopes.float().view(per_head) * distance[:, None, None]
        if visible is not None:
            scores.masked_fill_(~visible[:, None, None], -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        if extras.sinks is not None:
            lse = torch.logaddexp(lse, extras.sinks.float().view(per_head))
        weights = scores.sub_(lse).exp_()
        attended = (weights.flatten(2, 3) @ v.float()).view(*q.shape[:4], -1)
        return attended.to(q.dtype), lse.squeeze(-1)


@dataclass(frozen=True)
class _Extras:
    """What a layer's call adds: sinks [H], alibi_slopes [H], and whether the log-sum-exp is wanted."""

    sinks: Tensor | None
    alibi_slopes: Tensor | None
    lse: bool


class _Workspace:
    """Memory that gathers reuse: a fresh allocation of this size costs more than the copy on a host (page faults)."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor whose content is garbage, valid until the next call."""
        numel = math.prod(shape)
        if self._buffer is None or self._buffer.numel() < numel:
            self._buffer = None  # so that the old one can go before the new one comes
            self._buffer = torch.empty(numel, dtype=dtype, device=device)
        return self._buffer[:numel].view(shape)


def after_decodes(batch: AttentionBatch) -> AttentionBatch:
    """The requests after the decodes, and their tokens, as a batch of their own.

    For a backend with a kernel for decodes that leaves the rest to another: it hands on rows ``[num_decodes:]`` of `q`,
    `k`, `v`, `out` and `lse`.
    """
    num = batch.num_decodes
    return replace(
        batch,
        query_start=batch.query_start[num:] - num,
        seq_lens=batch.seq_lens[num:],
        block_table=batch.block_table[num:],
        slots=batch.slots[num:],
        query_start_host=batch.query_start_host[num:] - num,
        seq_lens_host=batch.seq_lens_host[num:],
        num_decodes=0,
    )


def _tiles(widths: list[int], start: int, budget: int) -> Iterator[slice]:
    """Cut requests from `start` on into runs of which ``number * largest width`` stays within `budget`, or of one."""
    while start < len(widths):
        stop, widest = start + 1, widths[start]
        while stop < len(widths) and (stop - start + 1) * max(widest, widths[stop]) <= budget:
            widest = max(widest, widths[stop])
            stop += 1
        yield slice(start, stop)
        start = stop


def _low(spec: AttentionSpec, position: Tensor) -> Tensor:
    """The first key that a causal query at `position` sees."""
    low = torch.zeros_like(position)
    if spec.window is not None:
        low = torch.maximum(low, position - (spec.window - 1))
    if spec.chunk is not None:
        low = torch.maximum(low, torch.div(position, spec.chunk, rounding_mode="floor") * spec.chunk)
    return low
