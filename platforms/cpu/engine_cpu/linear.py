"""Linear layers with weights in the order in which their kernel reads them: the only copy that is kept.

bf16 takes ``kernels/linear.cpp``, for any number of rows on any processor; a row's bits do not depend on the others.
Other dtypes take oneDNN, which chooses a kernel by the number of rows; all of them read one order.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_sdk import LinearMethod

_ROWS = 16
"""Rows that oneDNN's order is chosen for. It is a hint: on processors with AVX-512 one order serves all numbers."""

_PANEL = 32
"""Packed outputs and widths are multiples of it."""


class _Product(ctypes.Structure):
    """The same as `Product` in linear.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("outputs", "width")),
    ]


@dataclass(frozen=True)
class Packed:
    """A weight of `rows` outputs: in our order where it has a `product`, in oneDNN's where `opaque`, or as it was."""

    weight: Tensor
    bias: Tensor | None
    rows: int
    opaque: bool = False
    product: ctypes.Structure | None = None


class PackedLinear(LinearMethod):
    """Every dtype that the kernels or oneDNN multiply on this processor; other weights stay torch's own.

    Args:
        kernels: the library that `engine_cpu.native` built; None leaves bf16 to oneDNN too.
    """

    def __init__(self, kernels: ctypes.CDLL | None = None) -> None:
        self._kernels = kernels
        if kernels is not None:
            kernels.engine_large_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
            kernels.engine_pack.argtypes = [
                *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
                *(ctypes.c_void_p, ctypes.c_int32),
            ]
            self._multiply = kernels.engine_linear
            self._multiply.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32]
            self._multiply.restype = None
            self._look_up = kernels.engine_lookup
            self._look_up.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32]
            self._look_up.restype = ctypes.c_int64

    def pack(self, weight: Tensor, bias: Tensor | None) -> Packed:
        """See `LinearMethod.pack`."""
        rows = weight.shape[0]
        same = bias is None or bias.dtype == weight.dtype
        if self._kernels is not None and weight.dtype == torch.bfloat16 and same and weight.numel():
            return self._order(self._kernels, weight.contiguous(), None if bias is None else bias.contiguous())
        if not available() or weight.dtype not in _dtypes() or not weight.numel():
            return Packed(weight, bias, rows)
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        return Packed(ordered, bias, rows, opaque=True)

    def _order(self, kernels: ctypes.CDLL, weight: Tensor, bias: Tensor | None) -> Packed:
        rows, width = weight.shape
        panels, steps = -(-rows // _PANEL), -(-width // _PANEL)
        packed = torch.empty(panels, steps * _PANEL // 2, _PANEL, 2, dtype=weight.dtype)
        kernels.engine_large_pages(packed.data_ptr(), packed.nbytes)
        kernels.engine_pack(weight.data_ptr(), rows, width, packed.data_ptr(), torch.get_num_threads())
        product = _Product(packed.data_ptr(), None if bias is None else bias.data_ptr(), rows, width)
        return Packed(packed, bias, rows, product=product)

    def apply(self, x: Tensor, packed: object) -> Tensor:
        """See `LinearMethod.apply`."""
        assert isinstance(packed, Packed)
        if packed.product is not None:
            if x.shape[-1] != packed.product.width or x.dtype != packed.weight.dtype:
                expected = f"[..., {packed.product.width}] of {packed.weight.dtype}"
                raise ValueError(f"a linear layer takes {expected}, and this is {list(x.shape)} of {x.dtype}")
            out = torch.empty(*x.shape[:-1], packed.rows, dtype=x.dtype)
            self.multiply(x.contiguous(), packed.product, out)
            return out
        if not packed.opaque:
            return F.linear(x, packed.weight, packed.bias)
        if not x.numel():
            return x.new_empty(*x.shape[:-1], packed.rows)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")
        return y

    def multiply(self, x: Tensor, product: ctypes.Structure, out: Tensor) -> None:
        """``out = x @ weight.T + bias``; x [..., in] and out [..., out] are bf16 and contiguous."""
        rows = out.numel() // product.outputs
        self._multiply(ctypes.addressof(product), x.data_ptr(), rows, out.data_ptr(), torch.get_num_threads())

    def look_up(self, ids: Tensor, packed: Packed) -> Tensor:
        """Rows `ids`, int64 [...], of a weight that has a `product`: [..., in]. Raises `IndexError` for ids beyond."""
        assert packed.product is not None
        ids = ids.contiguous()
        out = torch.empty(*ids.shape, packed.product.width, dtype=packed.weight.dtype)
        product, threads = ctypes.addressof(packed.product), torch.get_num_threads()
        if strange := self._look_up(product, ids.data_ptr(), ids.numel(), out.data_ptr(), threads):
            raise IndexError(f"token ids beyond the embedding's {packed.rows} rows: {strange}")
        return out


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
