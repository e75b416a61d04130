"""Norm, gated activation, and products with few rows, through the kernels in ``kernels/operations.cpp``."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_cpu.attention import DTYPES
from engine_sdk import REFERENCE_OPS

MOST_ROWS = 64
"""Of a product that reads weights row by row; more rows are worth another order."""

_LEAST_OUTPUTS = 16


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("outer_stride", ctypes.c_int64), ("inner_stride", ctypes.c_int64)]


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("outer", "inner", "width")),
        *((name, ctypes.c_int32) for name in ("dtype", "num_threads")),
    ]


class Operations:
    """The kernels as functions of tensors; what they do not take goes to the references."""

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self._rms_norm = kernels.engine_rms_norm
        self._rms_norm.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_float]
        self._silu_and_mul = kernels.engine_silu_and_mul
        self._silu_and_mul.argtypes = [ctypes.c_void_p] * 4
        self._few_rows = kernels.engine_few_rows
        self._few_rows.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3, ctypes.c_int32]
        self.multiplies_bf16 = bool(kernels.engine_multiplies_bf16())

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `OpSet.rms_norm`."""
        rows = _rows(x)
        if rows is None or weight.dtype != x.dtype or not weight.is_contiguous():
            return REFERENCE_OPS.rms_norm(x, weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype)
        shape, place = _shape(rows), _Rows(*_place(rows))
        self._rms_norm(ctypes.addressof(shape), ctypes.addressof(place), weight.data_ptr(), out.data_ptr(), eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `OpSet.add_rms_norm`."""
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `OpSet.silu_and_mul`."""
        rows, others = _rows(gate), _rows(up)
        if rows is None or others is None or gate.shape != up.shape or gate.dtype != up.dtype:
            return REFERENCE_OPS.silu_and_mul(gate, up)
        out = torch.empty(gate.shape, dtype=gate.dtype)
        shape, first, second = _shape(rows), _Rows(*_place(rows)), _Rows(*_place(others))
        self._silu_and_mul(*map(ctypes.addressof, (shape, first, second)), out.data_ptr())
        return out

    def few_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x @ weight.T`` for weights that stay row by row, as those of an embedding must."""
        rows = x.numel() // max(1, x.shape[-1])
        takes = 0 < rows <= MOST_ROWS and x.dtype == weight.dtype == torch.bfloat16 and x.shape[-1] % 32 == 0
        if not (takes and self.multiplies_bf16 and weight.is_contiguous() and weight.shape[0] >= _LEAST_OUTPUTS):
            return F.linear(x, weight)
        x, outputs = x.contiguous(), weight.shape[0]
        out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
        self._few_rows(
            *(x.data_ptr(), weight.data_ptr(), out.data_ptr()),
            *(rows, outputs, x.shape[-1], torch.get_num_threads()),
        )
        return out


def _rows(x: Tensor) -> Tensor | None:
    """`x` as [outer, inner, width] without a copy; None where it is none of ours, or cannot be seen so."""
    if x.dtype not in DTYPES or not x.numel() or x.dim() < 1 or x.stride(-1) != 1:
        return None
    while x.dim() < 3:
        x = x[None]
    if x.dim() > 3:
        lengths = [i for i in range(x.dim() - 2) if x.shape[i] > 1]
        if len(lengths) > 1 and not x.is_contiguous():
            return None
        x = x.flatten(0, -3)  # a view: dimensions of one element fold into any other
    return x


def _place(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _shape(x: Tensor) -> _Shape:
    return _Shape(*x.shape, DTYPES[x.dtype], torch.get_num_threads())
