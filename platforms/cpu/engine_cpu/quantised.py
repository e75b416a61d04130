"""Linear layers with weights of 8 and 4 bits, through ``kernels/quantised.cpp``: one copy, in the order that it reads.

Activations keep their dtype. A single row and several are summed in the same order, so a row's bits do not depend on
the others.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_cpu.attention import DTYPES
from engine_cpu.memory import HostMemory
from engine_sdk import Norm, QuantizedLinear, QuantScheme, QuantWeight, TorchQuantized, quantise

_PANEL = 32
"""Outputs that lie together."""

_STEP = 32
"""Widths and groups are multiples of it."""

_AT_ONCE = 1 << 20
"""Weights that are rounded at a time."""


class _Weight(ctypes.Structure):
    """The same as `Weight` in interface.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("outputs", "width", "group")),
        *((name, ctypes.c_int32) for name in ("bits", "scale_dtype")),
    ]


@dataclass(frozen=True)
class Packed:
    """A weight in the kernel's order; `tensors` are what `weight` points to."""

    weight: _Weight
    tensors: tuple[Tensor | None, ...]
    bias: Tensor | None

    @property
    def gates(self) -> bool:
        """Whether the kernel can gate one half of the outputs with the other: both are whole panels."""
        return bool(self.weight.outputs % (2 * _PANEL) == 0)


class CpuQuantized(QuantizedLinear):
    """The schemes ``int8`` and ``int4``; widths and groups that are no multiples of 32 take `TorchQuantized`.

    Args:
        scheme: what the weights are.
        memory: gives them their place.
        kernels: the library that `engine_cpu.native` built.
    """

    def __init__(self, scheme: QuantScheme, memory: HostMemory, kernels: ctypes.CDLL) -> None:
        super().__init__(scheme)
        self._other, self._memory, self._kernels = TorchQuantized(scheme), memory, kernels
        kernels.engine_pack_quantised.argtypes = [
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32),
            *(ctypes.c_void_p, ctypes.c_int32),
        ]
        self._multiply = kernels.engine_multiply_quantised
        self._multiply.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p),
            *(ctypes.c_void_p, ctypes.c_float, ctypes.c_void_p),
            *[ctypes.c_int32] * 3,
        ]
        self._multiply.restype = None
        kernels.engine_rows_of_quantised.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p),
            ctypes.c_int32,
        ]

    def pack(self, weight: Tensor, bias: Tensor | None) -> object:
        """See `LinearMethod.pack`; some rows are rounded at a time."""
        return self._order(weight.shape, weight.dtype, lambda rows: quantise(weight[rows], self.scheme), bias)

    def pack_quantized(self, weight: QuantWeight, bias: Tensor | None) -> object:
        """See `LinearMethod.pack_quantized`."""

        def some(rows: slice) -> QuantWeight:
            zeros = None if weight.zeros is None else weight.zeros[rows]
            return QuantWeight(weight.values[rows], weight.scales[rows], zeros)

        return self._order(weight.values.shape, weight.scales.dtype, some, bias, zeros=weight.zeros is not None)

    def _order(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        some: Callable[[slice], QuantWeight],
        bias: Tensor | None,
        *,
        zeros: bool = False,
    ) -> object:
        outputs, width = shape
        group = self.scheme.group_size or width
        if not outputs or not width or width % _STEP or group % _STEP or width % group or dtype not in DTYPES:
            return self._other.pack_quantized(some(slice(None)), bias)
        panels, threads = -(-outputs // _PANEL), torch.get_num_threads()
        codes = self._memory.for_weight((panels, width * _PANEL * self.scheme.bits // 8), torch.uint8)
        scales = self._memory.for_weight((panels, width // group, _PANEL), dtype)
        offsets = self._memory.for_weight(tuple(scales.shape), torch.int8) if zeros else None
        step = max(1, _AT_ONCE // width // _PANEL)
        for begin in range(0, panels, step):
            part = some(slice(begin * _PANEL, (begin + step) * _PANEL))
            values, here = part.values.contiguous(), slice(begin, begin + step)
            self._kernels.engine_pack_quantised(
                *(values.data_ptr(), *values.shape, self.scheme.bits, codes[begin].data_ptr(), threads)
            )
            scales[here] = _panels(part.scales)
            if offsets is not None and part.zeros is not None:
                offsets[here] = _panels(part.zeros)
        tensors = codes, scales, offsets
        places = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        return Packed(_Weight(*places, outputs, width, group, self.scheme.bits, DTYPES[dtype]), tensors, bias)

    def apply(self, x: Tensor, packed: object) -> Tensor:
        """See `LinearMethod.apply`."""
        if not isinstance(packed, Packed):
            return self._other.apply(x, packed)
        if x.dtype not in DTYPES:
            return self.apply(x.float(), packed).to(x.dtype)
        y = self.multiply(x, packed)
        return y if packed.bias is None else y + packed.bias

    def multiply(
        self,
        x: Tensor,
        packed: Packed,
        *,
        norm: Norm | None = None,
        added: Tensor | None = None,
        gated: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """``x @ weight.T``, without a bias, with what stands around it in a model.

        All tensors have one dtype, of `DTYPES`, and each step rounds to it, as separate operations would.

        Args:
            x: [..., in].
            packed: the weight.
            norm: an RMS norm of x before.
            added: of the result's shape, contiguous, added after.
            gated: the result is ``silu(gate) * up`` of the halves of the outputs, which the weight `gates`.
            out: [..., out], or [..., out / 2] where gated, contiguous; a new tensor if None.
        """
        weight = packed.weight
        if x.shape[-1] != weight.width or x.dtype not in DTYPES:
            raise ValueError(f"a linear layer takes [..., {weight.width}], and this is {list(x.shape)} of {x.dtype}")
        x = x.contiguous()
        if out is None:
            out = torch.empty(*x.shape[:-1], weight.outputs // 2 if gated else weight.outputs, dtype=x.dtype)
        self._multiply(
            *(ctypes.addressof(weight), x.data_ptr(), x.numel() // weight.width, out.data_ptr()),
            *((None, 0.0) if norm is None else (norm.weight.data_ptr(), norm.eps)),
            *(None if added is None else added.data_ptr(), gated, DTYPES[x.dtype], torch.get_num_threads()),
        )
        return out

    def feed_forward(self, x: Tensor, norm: Norm, gate_up: Packed, down: Packed) -> Tensor:
        """``x + down(silu(gate) * up)``, gate and up of the norm of x [..., in]; see `multiply`."""
        x = x.contiguous()
        return self.multiply(self.multiply(x, gate_up, norm=norm, gated=True), down, added=x)

    def rows(self, ids: Tensor, packed: object) -> Tensor:
        """See `LinearMethod.rows`; fp32. Raises `IndexError` for ids beyond."""
        if not isinstance(packed, Packed):
            return self._other.rows(ids, packed)
        if ids.numel() and not 0 <= int(ids.amin()) <= int(ids.amax()) < packed.weight.outputs:
            raise IndexError(f"there are token ids beyond the embedding's {packed.weight.outputs} rows")
        out, ids = torch.empty(*ids.shape, packed.weight.width), ids.contiguous()
        self._kernels.engine_rows_of_quantised(
            *(ctypes.addressof(packed.weight), ids.data_ptr(), ids.numel(), out.data_ptr(), torch.get_num_threads())
        )
        return out


def _panels(rows: Tensor) -> Tensor:
    """[N, G] as [N' / 32, G, 32], zero beyond N."""
    whole: Tensor = F.pad(rows, (0, 0, 0, -len(rows) % _PANEL)).unflatten(0, (-1, _PANEL))
    return whole.transpose(1, 2)
