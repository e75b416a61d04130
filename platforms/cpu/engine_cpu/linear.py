"""Linear layers with weights in the order in which their kernel reads them: the only copy that is kept.

bf16 takes ``kernels/linear.cpp``, for any number of rows on any processor; a row's bits do not depend on the others.
Other dtypes take oneDNN, which chooses a kernel by the number of rows; all of them read one order.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_cpu.memory import HostMemory
from engine_sdk import LinearMethod, Norm

_ROWS = 16
"""Rows that oneDNN's order is chosen for. It is a hint: on processors with AVX-512 one order serves all numbers."""

_PANEL = 32
"""Packed outputs and widths are multiples of it."""


class _Product(ctypes.Structure):
    """The same as `Product` in interface.h."""

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

    @property
    def gates(self) -> bool:
        """Whether the kernel can gate one half of the outputs with the other: both are whole panels."""
        return self.product is not None and self.rows % (2 * _PANEL) == 0


class PackedLinear(LinearMethod):
    """Every dtype that the kernels or oneDNN multiply on this processor; other weights stay torch's own.

    Args:
        memory: gives weights in our order their place.
        kernels: the library that `engine_cpu.native` built; None leaves bf16 to oneDNN too.
    """

    def __init__(self, memory: HostMemory, kernels: ctypes.CDLL | None = None) -> None:
        self._memory, self._kernels = memory, kernels
        if kernels is not None:
            kernels.engine_pack.argtypes = [
                *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
                *(ctypes.c_void_p, ctypes.c_int32),
            ]
            self._multiply = kernels.engine_linear
            self._multiply.argtypes = [
                *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p),
                *(ctypes.c_void_p, ctypes.c_float, ctypes.c_void_p, ctypes.c_int32),
            ]
            self._multiply.restype = None
            self._gated = kernels.engine_gated
            self._gated.argtypes = [
                *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p),
                *(ctypes.c_void_p, ctypes.c_float, ctypes.c_int32),
            ]
            self._gated.restype = None
            self._look_up = kernels.engine_lookup
            self._look_up.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32]
            self._look_up.restype = ctypes.c_int64

    def pack(self, weight: Tensor, bias: Tensor | None) -> Packed:
        """See `LinearMethod.pack`."""
        return self.pack_joined((weight,), bias)

    def pack_joined(self, weights: Sequence[Tensor], bias: Tensor | None) -> Packed:
        """See `LinearMethod.pack_joined`: those of whole panels are packed one below the other."""
        if any(len(weight) % _PANEL for weight in weights[:-1]):
            weights = (torch.cat(tuple(weights)),)
        same = all(tensor.dtype == torch.bfloat16 for tensor in (*weights, *(() if bias is None else (bias,))))
        if self._kernels is not None and same and all(weight.numel() for weight in weights):
            return self._order(self._kernels, weights, None if bias is None else bias.contiguous())
        weight = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
        rows = weight.shape[0]
        if not available() or weight.dtype not in _dtypes() or not weight.numel():
            return Packed(weight, bias, rows)
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        return Packed(ordered, bias, rows, opaque=True)

    def _order(self, kernels: ctypes.CDLL, weights: Sequence[Tensor], bias: Tensor | None) -> Packed:
        rows, width = sum(map(len, weights)), weights[0].shape[1]
        shape = -(-rows // _PANEL), -(-width // _PANEL) * _PANEL // 2, _PANEL, 2
        packed, panel = self._memory.for_weight(shape, torch.bfloat16), 0
        for weight in weights:
            weight = weight.contiguous()
            threads = torch.get_num_threads()
            kernels.engine_pack(weight.data_ptr(), len(weight), width, packed[panel].data_ptr(), threads)
            panel += -(-len(weight) // _PANEL)
        product = _Product(packed.data_ptr(), None if bias is None else bias.data_ptr(), rows, width)
        return Packed(packed, bias, rows, product=product)

    def apply(self, x: Tensor, packed: object) -> Tensor:
        """See `LinearMethod.apply`."""
        assert isinstance(packed, Packed)
        if packed.product is not None:
            return self.multiply(x, packed)
        if not packed.opaque:
            return F.linear(x, packed.weight, packed.bias)
        if not x.numel():
            return x.new_empty(*x.shape[:-1], packed.rows)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")
        return y

    def multiply(
        self,
        x: Tensor,
        packed: Packed,
        *,
        norm: Norm | None = None,
        added: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """``x @ weight.T + bias`` for a weight that has a `product`, with what stands around it in a model.

        All tensors are bf16, and each step rounds to it, as separate operations would.

        Args:
            x: [..., in].
            packed: the weight.
            norm: an RMS norm of x before.
            added: [..., out], contiguous, added after.
            out: [..., out], contiguous; a new tensor if None.
        """
        product = packed.product
        assert product is not None
        x, rows = _rows(x, product)
        if out is None:
            out = torch.empty(*x.shape[:-1], packed.rows, dtype=x.dtype)
        self._multiply(
            *(ctypes.addressof(product), x.data_ptr(), rows, out.data_ptr()),
            *((None, 0.0) if norm is None else (norm.weight.data_ptr(), norm.eps)),
            *(None if added is None else added.data_ptr(), torch.get_num_threads()),
        )
        return out

    def feed_forward(self, x: Tensor, norm: Norm, gate_up: Packed, down: Packed) -> Tensor:
        """``x + down(silu(gate) * up)``, gate and up of the norm of x [..., in]; rounded as in `multiply`.

        The weights have a `product`, and `gate_up` two halves that `gates`.
        """
        assert gate_up.product is not None
        assert down.product is not None
        x, rows = _rows(x, gate_up.product)
        out = torch.empty_like(x)
        self._gated(
            *(ctypes.addressof(gate_up.product), ctypes.addressof(down.product), x.data_ptr(), rows, out.data_ptr()),
            *(norm.weight.data_ptr(), norm.eps, torch.get_num_threads()),
        )
        return out

    def look_up(self, ids: Tensor, packed: Packed) -> Tensor:
        """Rows `ids`, int64 [...], of a weight that has a `product`: [..., in]. Raises `IndexError` for ids beyond."""
        assert packed.product is not None
        ids = ids.contiguous()
        out = torch.empty(*ids.shape, packed.product.width, dtype=packed.weight.dtype)
        product, threads = ctypes.addressof(packed.product), torch.get_num_threads()
        if strange := self._look_up(product, ids.data_ptr(), ids.numel(), out.data_ptr(), threads):
            raise IndexError(f"token ids beyond the embedding's {packed.rows} rows: {strange}")
        return out


def _rows(x: Tensor, product: ctypes.Structure) -> tuple[Tensor, int]:
    """`x`, contiguous, and how many rows it has; raises `ValueError` where it is none of the product's."""
    if x.shape[-1] != product.width or x.dtype != torch.bfloat16:
        expected = f"[..., {product.width}] of {torch.bfloat16}"
        raise ValueError(f"a linear layer takes {expected}, and this is {list(x.shape)} of {x.dtype}")
    return x.contiguous(), x.numel() // product.width


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
