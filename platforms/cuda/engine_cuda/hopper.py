"""Attention on Hopper: prompts by a kernel of their own, everything else by Triton's.

Of a step's requests those with few tokens, decodes and drafts, go to `TritonAttention` as everywhere. The others do
too, unless there are enough of them to fill the device with tiles of 128 rows: then `attend_prompts` has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine_cuda.hopper_kernel import BOX, BOX_LAYOUT, ROWS, attend_prompts
from engine_sdk import AttentionBatch, AttentionSpec, KVCache
from engine_sdk.triton.attention import Launch, TritonAttention, tiles_of
from engine_sdk.triton.tuning import AttentionTuning, DeviceProperties, describable

_BOX = BOX.value
_FEW_KEYS = 2048  # that one program attends about as fast as several that share them
_RING_BYTES = 160 << 10  # of keys and values in shared memory, beside two tiles of queries


class HopperAttention(TritonAttention):
    """`TritonAttention` for layers that `suits`, faster where prompts are long or many.

    The contract is the same. Of a request's own tokens, though, one whose values are NaN may show in the 128 before
    it, as it shows in those of its tile there.
    """

    _counters: Tensor | None = None

    @classmethod
    def suits(cls, spec: AttentionSpec) -> bool:
        """Whether the kernel computes such layers: causal, of 16 bits throughout, without further features."""
        return (
            not spec.features()
            and spec.head_dim in (64, 128)
            and _BOX % (spec.num_heads // spec.num_kv_heads) == 0
            and spec.dtype in (torch.bfloat16, torch.float16)
            and spec.kv_dtype == spec.dtype
            and spec.scale > 0
        )

    def _prefill(
        self, batch: AttentionBatch, device: DeviceProperties, tuning: AttentionTuning, short: int
    ) -> Launch | None:
        spec = self.spec
        group = spec.num_heads // spec.num_kv_heads
        step = ROWS.value // group
        items = tiles_of(batch, short, step) * spec.num_kv_heads
        otherwise = super()._prefill(batch, device, tuning, short)
        if otherwise is None or not self._fills(batch, items, step, device) or batch.block_size % _BOX:
            return otherwise
        if self._counters is None:
            self._counters = torch.zeros(2, dtype=torch.int32, device=batch.slots.device)
        return _PromptLaunch(
            (min(items, device.num_cores),),
            (
                batch.block_table,
                batch.seq_lens,
                batch.query_start,
                self._counters,
                batch.num_requests,
                items,
                batch.block_table.stride(0),
            ),
            {
                "SCALE": spec.scale,
                "LONGER": short,
                "GROUP": group,
                "D": spec.head_dim,
                "KV_HEADS": spec.num_kv_heads,
                "BLOCK_SIZE": batch.block_size,
                "SLOTS": _RING_BYTES // (ROWS.value * spec.head_dim * 2),
                "num_warps": 4,
                "maxnreg": 168,
            },
            otherwise,
        )

    @staticmethod
    def _fills(batch: AttentionBatch, items: int, step: int, device: DeviceProperties) -> bool:
        """Whether tiles of `step` tokens are worth it: not mostly empty, and enough of them, or with few keys each.

        Triton's kernel splits the keys where fewer have many: 16 tiles of 8000 keys take it half the time.
        """
        return batch.max_query_len >= step and (4 * items >= 3 * device.num_cores or batch.max_seq_len <= _FEW_KEYS)


@dataclass(frozen=True)
class _PromptLaunch(Launch):
    """A launch of `attend_prompts`, and the one of `attend` for tensors that the copy engine does not take."""

    otherwise: Launch

    def run(
        self,
        q: Tensor,
        cache: KVCache,
        out: Tensor,
        lse: Tensor | None,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
    ) -> None:
        """See `Launch.run`; layers with sinks or slopes have no such launch."""
        if not (describable(q) and all(describable(x) and _heads_are_dense(x) for x in (cache.keys, cache.values))):
            self.otherwise.run(q, cache, out, lse, sinks, alibi_slopes)
            return
        group = self.constants["GROUP"]
        attend_prompts[self.grid](
            _describe(q, [_BOX // group, group, _BOX]),
            _describe(cache.keys.flatten(2), [1, _BOX, _BOX]),
            _describe(cache.values.flatten(2), [1, _BOX, _BOX]),
            out,
            lse,
            *self.inputs,
            *out.stride()[:2],
            *((0, 0) if lse is None else lse.stride()),
            **self.constants,
        )


def _heads_are_dense(x: Tensor) -> bool:
    """Whether the heads of a token [num_blocks, B, K, D] lie beside one another."""
    return x.stride(2) == x.shape[3]


def _describe(x: Tensor, box: list[int]) -> Any:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, BOX_LAYOUT)
