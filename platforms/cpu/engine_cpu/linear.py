"""Linear layers through oneDNN, with weights in the order in which its kernels read them: the only copy that is kept.

oneDNN chooses a kernel by the number of rows; all of them read the same order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_sdk import LinearMethod

_ROWS = 16
"""Rows that the order is chosen for. It is a hint: on processors with AVX-512 one order serves all numbers."""


@dataclass(frozen=True)
class Packed:
    """A weight of `rows` outputs: opaque to torch where `opaque`, or as it was."""

    weight: Tensor
    bias: Tensor | None
    rows: int
    opaque: bool


class PackedLinear(LinearMethod):
    """Every dtype that oneDNN multiplies on this processor; other weights stay torch's own."""

    def pack(self, weight: Tensor, bias: Tensor | None) -> Packed:
        """See `LinearMethod.pack`."""
        if weight.dtype not in _dtypes() or not weight.numel():
            return Packed(weight, bias, weight.shape[0], opaque=False)
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        return Packed(ordered, bias, weight.shape[0], opaque=True)

    def apply(self, x: Tensor, packed: object) -> Tensor:
        """See `LinearMethod.apply`."""
        assert isinstance(packed, Packed)
        if not packed.opaque:
            return F.linear(x, packed.weight, packed.bias)
        if not x.numel():
            return x.new_empty(*x.shape[:-1], packed.rows)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")
        return y


def available() -> bool:
    """Whether this torch has oneDNN."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


@functools.cache
def _dtypes() -> set[torch.dtype]:
    low = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return {torch.float32, *(dtype for dtype, supported in low.items() if supported)}
