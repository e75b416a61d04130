"""Paged attention through the kernels in ``kernels/attention.cpp``: decodes, prompts and both in one call.

`plan` cuts a step into items, each some tokens of one request. An item times a key/value head is what a thread takes at
a time. How a request is cut follows from its own positions, so its bits do not depend on what else is in the batch.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from engine_cpu.layout import WIDTH, PackedLayout
from engine_sdk import (
    ATTENTION_FEATURES,
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    Capabilities,
    KVCache,
    KVLayout,
    Plan,
    TorchAttention,
    UnsupportedCapability,
    Verdict,
)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_ROWS = 64  # query heads times tokens that a tile of a prompt has
_SPAN = 256  # keys between two looks at the softmax, about: whole blocks
_PART = 8  # of these that a decode does in one piece
_FAR = 1 << 30  # keys: what reaches so far reaches all, and with a position it still fits into 32 bits


# `AttentionSpec`, `AttentionStep` and `AttentionCall`, field by field. Structures of ctypes would take more time.
_SPEC, _STEP, _CALL = struct.Struct("10i 2f 2i"), struct.Struct("3P 3q"), struct.Struct("9P 10q")


@dataclass(frozen=True)
class _Plan:
    """One step. `step` holds addresses of the tensors."""

    spec: bytes
    step: bytes
    tensors: tuple[Tensor, ...]
    partial: Tensor | None  # fp32 [parts, H, E' + 2]: of requests that are cut, sums, maximum and denominator


class CpuAttention(AttentionBackend):
    """Every feature of the contract, in one kernel.

    Args:
        spec: what to compute.
        kernels: the library that `engine_cpu.native` built.
        declared: the platform's capabilities, so that what it did not declare is refused here too.
    """

    features = ATTENTION_FEATURES

    def __init__(self, spec: AttentionSpec, kernels: ctypes.CDLL, declared: Capabilities) -> None:
        super().__init__(spec)
        self._declared = declared
        self._layouts: dict[int, PackedLayout] = {}
        self._run = kernels.engine_attention
        self._run.restype = None

    @classmethod
    def supports(cls, spec: AttentionSpec) -> Verdict:
        """All that `TorchAttention` has, for the three dtypes of the kernel."""
        for dtype in (spec.dtype, spec.kv_dtype):
            if dtype not in DTYPES:
                return Verdict.no(f"there is no kernel for {dtype}; use float32, bfloat16 or float16")
        return TorchAttention.supports(spec)

    def layout(self, block_size: int) -> KVLayout:
        """A `PackedLayout`."""
        if block_size not in self._declared.block_sizes:
            raise UnsupportedCapability("block_sizes", block_size, f"declared: {self._declared.block_sizes}")
        if block_size not in self._layouts:
            spec = self.spec
            self._layouts[block_size] = PackedLayout(
                block_size, spec.num_kv_heads, spec.head_dim, spec.v_head_dim, spec.kv_dtype
            )
        return self._layouts[block_size]

    def plan(self, batch: AttentionBatch) -> Plan:
        """Cut the step into items, the longest first, so that no thread gets one at the end."""
        spec, size = self.spec, batch.block_size
        cut = list(self._items(batch))
        parts = sum(item[8] > 0 for item in cut)
        cut.sort(key=lambda item: item[2] * (item[6] - item[5]), reverse=True)
        items = torch.tensor(cut, dtype=torch.int32).view(-1, 10)
        table, slots = batch.block_table.contiguous(), batch.slots.contiguous()
        width = -(-spec.v_head_dim // WIDTH) * WIDTH + 2
        return _Plan(
            _SPEC.pack(
                *(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.v_head_dim),
                *(DTYPES[spec.dtype], DTYPES[spec.kv_dtype], spec.causal, size),
                *(min(reach or 0, _FAR) for reach in (spec.window, spec.chunk)),
                *(spec.scale, spec.softcap or 0),
                *(-1 if spec.relative is None else spec.relative, torch.get_num_threads()),
            ),
            _STEP.pack(
                *(table.data_ptr(), slots.data_ptr(), items.data_ptr()),
                *(int(batch.query_start_host[-1]), len(items), table.stride(0)),
            ),
            (table, slots, items),
            torch.empty(parts, spec.num_heads, width) if parts else None,
        )

    def _items(self, batch: AttentionBatch) -> Iterator[tuple[int, ...]]:
        """Items as attention.cpp has them; of requests that have neither keys nor queries there is none."""
        spec = self.spec
        span = max(1, _SPAN // batch.block_size) * batch.block_size
        tile = max(1, _ROWS * spec.num_kv_heads // spec.num_heads)
        part = 0
        starts, lengths = batch.query_start_host.tolist(), batch.seq_lens_host.tolist()
        for request, length in enumerate(lengths):
            token, end = starts[request : request + 2]
            if length <= 0:
                continue
            if end - token == 1:
                low = self._low(length - 1)
                cuts = [low, *range(low // span * span + _PART * span, length, _PART * span), length]
                for begin, stop in itertools.pairwise(cuts):
                    whole = len(cuts) == 2
                    number, merges = (0, 0) if whole else (len(cuts) - 1, begin == low)
                    yield request, token, 1, length - 1, length, begin, stop, part, number, merges
                    part += not whole
                continue
            # Tiles begin at multiples of their size in the request, so that chunks of a prompt are cut alike.
            position = length - (end - token)
            while token < end:
                count = min(tile - position % tile, end - token)
                ahead = 1 if spec.causal else spec.window or length
                stop = min(length, position + count - 1 + ahead)
                yield request, token, count, position, length, self._low(position), stop, 0, 0, 0
                token, position = token + count, position + count

    def _low(self, position: int) -> int:
        """The first key that a query at `position` sees."""
        window, chunk = self.spec.window, self.spec.chunk
        low = 0 if window is None else max(0, position - window + 1)
        return low if chunk is None else max(low, position // chunk * chunk)

    @staticmethod
    def in_layer(cache: KVCache, plan: Plan) -> tuple[Any, ...]:
        """The last arguments of ``engine_layer`` but one: specification, step, cache, bytes of a block and parts."""
        raw, partial = cast(Tensor, cache.raw), plan.partial
        place = raw.data_ptr(), raw.stride(0) * raw.element_size()
        return plan.spec, plan.step, *place, None if partial is None else partial.data_ptr()

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
        sinks, slopes = (None if x is None else x.float().contiguous() for x in (sinks, alibi_slopes))
        raw = cast(Tensor, cache.raw)
        call = _CALL.pack(
            q.data_ptr(),
            *((0, 0) if k is None or v is None else (k.data_ptr(), v.data_ptr())),
            *(raw.data_ptr(), out.data_ptr()),
            *(0 if x is None else x.data_ptr() for x in (sinks, slopes, lse, plan.partial)),
            *q.stride()[:2],
            *((0, 0, 0, 0) if k is None or v is None else (*k.stride()[:2], *v.stride()[:2])),
            *out.stride()[:2],
            *(0 if lse is None else lse.stride(0), raw.stride(0) * raw.element_size()),
        )
        self._run(plan.spec, plan.step, call)
