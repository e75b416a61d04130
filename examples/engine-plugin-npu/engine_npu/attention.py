"""Attention: decodes run the chip's own kernel over tiles; prefills go through the SDK's attention in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine_npu import kernels
from engine_npu.layout import BLOCK_SIZE, TiledLayout
from engine_sdk import (
    ATTENTION_FEATURES,
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    Capabilities,
    KVCache,
    KVLayout,
    PagedCache,
    Plan,
    TorchAttention,
    UnsupportedCapability,
)


@dataclass(frozen=True)
class _Prefill:
    """The rows after the decodes. `blocks` int64 are taken out of the tiles, and `plan` reads them by their order."""

    blocks: Tensor
    plan: Plan


@dataclass(frozen=True)
class _Plan:
    num_decodes: int
    slots: Tensor
    table: Tensor
    lengths: Tensor
    prefill: _Prefill | None


class NpuAttention(AttentionBackend):
    """Paged attention on the chip: everything but ALiBi and values of another head size.

    A plan of decodes alone holds nothing but the batch's own tensors, and the kernel reads the lengths on the device.
    So a captured step stays right when the contents of these tensors change.
    """

    features = ATTENTION_FEATURES - {"alibi", "v_head_dim"}

    def __init__(self, spec: AttentionSpec, declared: Capabilities) -> None:
        super().__init__(spec)
        self._prefill = TorchAttention(spec, declared=declared)
        self._layout = TiledLayout(spec.num_kv_heads, spec.head_dim, spec.kv_dtype)

    def layout(self, block_size: int) -> KVLayout:
        """Tiles; the block size is the chip's."""
        if block_size != BLOCK_SIZE:
            raise UnsupportedCapability("block_sizes", block_size, f"an NPU's blocks hold {BLOCK_SIZE} tokens")
        return self._layout

    def plan(self, batch: AttentionBatch) -> Plan:
        """See `AttentionBackend.plan`."""
        num = batch.num_decodes
        prefill = self._plan_prefill(batch) if num < batch.num_requests else None
        return _Plan(num, batch.slots, batch.block_table[:num], batch.seq_lens[:num], prefill)

    def _plan_prefill(self, batch: AttentionBatch) -> _Prefill:
        """Plan the rows after the decodes as a batch of their own, whose blocks are numbered as they are taken out."""
        num = batch.num_decodes
        counts = (-(-batch.seq_lens_host[num:] // BLOCK_SIZE)).tolist()
        blocks = [batch.block_table[num + row, :count] for row, count in enumerate(counts)]
        held = -(-batch.seq_lens[num:, None] // BLOCK_SIZE)
        first = held.cumsum(0, dtype=torch.int32) - held
        rows = replace(
            batch,
            query_start=batch.query_start[num:] - num,
            seq_lens=batch.seq_lens[num:],
            block_table=first + torch.arange(max(counts), dtype=torch.int32, device=first.device),
            slots=batch.slots[num:],
            query_start_host=batch.query_start_host[num:] - num,
            seq_lens_host=batch.seq_lens_host[num:],
            num_decodes=0,
        )
        return _Prefill(torch.cat(blocks).long(), self._prefill.plan(rows))

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
        spec, num = self.spec, plan.num_decodes
        if k is not None and v is not None:
            kernels.store_kv(k, v, plan.slots, cache.keys, cache.values)
        if num:
            kernels.attend_decode(
                q[:num],
                cache.keys,
                cache.values,
                plan.table,
                plan.lengths,
                sinks,
                spec.scale,
                spec.window,
                spec.chunk,
                spec.softcap,
                out[:num],
                None if lse is None else lse[:num],
            )
        if plan.prefill is not None:
            blocks = PagedCache(*self._layout.export_blocks(cache, plan.prefill.blocks))
            rest = None if lse is None else lse[num:]
            self._prefill.forward(q[num:], None, None, blocks, plan.prefill.plan, out[num:], sinks=sinks, lse=rest)
