"""Attention: decodes run the chip's own kernel; the rest goes through the SDK's attention, over the same tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from engine_npu import kernels
from engine_sdk import (
    ATTENTION_FEATURES,
    AttentionBatch,
    AttentionSpec,
    Capabilities,
    KVCache,
    Plan,
    Tiled,
    TorchAttention,
    after_decodes,
)

BLOCK_SIZE = 128
"""Tokens of a block."""

LANES = 16
"""Elements of a tile's row; head sizes are multiples of it."""


@dataclass(frozen=True)
class _Plan:
    """Tensors of the batch, cut to its decodes; and the SDK's plan of what comes after them."""

    slots: Tensor
    table: Tensor
    lengths: Tensor
    rest: Plan | None


class NpuAttention(TorchAttention):
    """Paged attention on the chip: everything but ALiBi and values of another head size.

    A plan of decodes alone holds nothing but the batch's own tensors, and the kernels read slots and lengths on the
    device. So a captured step stays right when the contents of these tensors change, and `refresh` has nothing to do.
    """

    features = ATTENTION_FEATURES - {"alibi", "v_head_dim", "two_sided_window", "relative_bias"}

    def __init__(self, spec: AttentionSpec, declared: Capabilities) -> None:
        super().__init__(spec, layout=functools.partial(Tiled, lanes=LANES), declared=declared)

    def plan(self, batch: AttentionBatch) -> Plan:
        """See `AttentionBackend.plan`."""
        num = batch.num_decodes
        rest = super().plan(after_decodes(batch)) if num < batch.num_requests else None
        return _Plan(batch.slots[:num], batch.block_table[:num], batch.seq_lens[:num], rest)

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
        """See `AttentionBackend.forward`. Both parts write before either reads what the other wrote."""
        spec, num = self.spec, len(plan.lengths)
        decodes, rest = slice(num), slice(num, None)
        if num and k is not None and v is not None:
            kernels.store_kv(k[decodes], v[decodes], plan.slots, cache.keys, cache.values)
        if plan.rest is not None:
            new_k, new_v = (None if x is None else x[rest] for x in (k, v))
            logsum = None if lse is None else lse[rest]
            super().forward(q[rest], new_k, new_v, cache, plan.rest, out[rest], sinks=sinks, lse=logsum)
        if num:
            kernels.attend_decode(
                q[decodes],
                cache.keys,
                cache.values,
                plan.table,
                plan.lengths,
                sinks,
                spec.scale,
                spec.window,
                spec.chunk,
                spec.softcap,
                out[decodes],
                None if lse is None else lse[decodes],
            )
