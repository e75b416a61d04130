"""Norm, gated activation, rotary embedding and greedy sampling through the kernels in ``kernels/operations.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from engine_cpu.attention import DTYPES
from engine_sdk import REFERENCE_OPS, DrawInputs, Norm

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Heads(ctypes.Structure):
    """The same as `Heads` in interface.h."""

    _fields_ = [
        *((name, _LONG) for name in ("queries", "keys", "width")),
        *((name, _POINTER) for name in ("query_norm", "key_norm")),
        *((name, ctypes.c_float) for name in ("query_eps", "key_eps")),
    ]


class Operations:
    """The kernels as functions of tensors; what they do not take goes to the references."""

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self._rms_norm = kernels.engine_rms_norm
        self._rms_norm.argtypes = [*[_POINTER] * 3, *[_LONG] * 5, ctypes.c_float, *[_INT] * 2]
        self._silu_and_mul = kernels.engine_silu_and_mul
        self._silu_and_mul.argtypes = [*[_POINTER] * 3, *[_LONG] * 7, *[_INT] * 2]
        self._rotary = kernels.engine_rotary
        self._rotary.argtypes = [*[_POINTER] * 4, *[_LONG] * 5, *[_INT] * 2]
        self._prepare = kernels.engine_prepare
        self._prepare.argtypes = [*[_POINTER] * 4, _LONG, *[_INT] * 2]
        self._choose = kernels.engine_choose
        self._choose.argtypes = [_POINTER, *[_LONG] * 3, _POINTER, *[_INT] * 2]
        for function in (self._rms_norm, self._silu_and_mul, self._rotary, self._prepare, self._choose):
            function.restype = None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `OpSet.rms_norm`."""
        rows = _rows(x)
        if rows is None or weight.dtype != x.dtype or not weight.is_contiguous():
            return REFERENCE_OPS.rms_norm(x, weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype)
        self._rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *rows, eps, *_kind(x))
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `OpSet.add_rms_norm`."""
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `OpSet.silu_and_mul`."""
        rows, others = _rows(gate), _rows(up)
        if rows is None or others is None or rows[:3] != others[:3] or gate.shape != up.shape or gate.dtype != up.dtype:
            return REFERENCE_OPS.silu_and_mul(gate, up)
        out = torch.empty(gate.shape, dtype=gate.dtype)
        self._silu_and_mul(gate.data_ptr(), up.data_ptr(), out.data_ptr(), *rows, *others[3:], *_kind(gate))
        return out

    def draw(self, logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        """See `OpSet.draw`; the kernel is for steps whose rows all take their largest logit."""
        if inputs is not None or logits.dtype not in DTYPES or logits.stride(-1) != 1 or not logits.numel():
            return REFERENCE_OPS.draw(logits, inputs)
        out = torch.empty(len(logits), dtype=torch.int64)
        self._choose(logits.data_ptr(), *logits.shape, logits.stride(0), out.data_ptr(), *_kind(logits))
        return out

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """See `OpSet.rotary`."""
        return self.turned(q, k, cos, sin) or REFERENCE_OPS.rotary(q, k, cos, sin)

    def turned(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
        """`rotary`, results lying token by token, as attention reads them; None for what the kernel does not take."""
        turned_q, turned_k = self._turn(q, cos, sin), self._turn(k, cos, sin)
        return None if turned_q is None or turned_k is None else (turned_q, turned_k)

    def heads(
        self, num_heads: int, num_kv_heads: int, width: int, norms: tuple[Norm, Norm] | None
    ) -> Callable[[Tensor, Tensor, Tensor], None]:
        """What norms, where there are `norms` of queries and keys, and turns these where they lie.

        It takes x [N, H + 2K, D], contiguous: queries, keys and values of each token; and cos and sin [1, N, D], which
        turn as in `OpSet.rotary`. Raises `ValueError` for another shape or dtype.
        """
        structure, weights = heads_of(num_heads, num_kv_heads, width, norms)
        row = num_heads + 2 * num_kv_heads, width

        def prepare(x: Tensor, cos: Tensor, sin: Tensor) -> None:
            if x.shape[1:] != row or any(weight.dtype != x.dtype for weight in weights):
                raise ValueError(f"heads {list(row)} are none of {list(x.shape)} of {x.dtype}, or normed as others")
            cos, sin = angles(cos, sin, len(x), width, x.dtype)
            self._prepare(
                *(ctypes.addressof(structure), x.data_ptr(), cos.data_ptr(), sin.data_ptr()), len(x), *_kind(x)
            )

        return prepare

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
        """One of the two, [..., H, N, D]: what the kernel takes is of one batch, and turned in all of D."""
        *before, heads, tokens, width = x.shape
        same = cos.shape == sin.shape == (*before, tokens, width) and cos.dtype == sin.dtype == x.dtype in DTYPES
        if not same or not x.numel() or x.numel() != heads * tokens * width or x.stride(-1) != 1 or width % 2:
            return None
        out = torch.empty(*before, tokens, heads, width, dtype=x.dtype)
        place = x.stride(-3), x.stride(-2)
        cos, sin = cos.contiguous(), sin.contiguous()
        self._rotary(
            *(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr()), heads, tokens, width, *place, *_kind(x)
        )
        return out.transpose(-2, -3)


def heads_of(
    num_heads: int, num_kv_heads: int, width: int, norms: tuple[Norm, Norm] | None
) -> tuple[Heads, list[Tensor]]:
    """What the kernels know of a layer's heads, and the weights that it points to."""
    weights = [norm.weight.contiguous() for norm in norms or ()]
    structure = Heads(num_heads, num_kv_heads, width)
    if norms is not None:
        structure.query_norm, structure.key_norm = (weight.data_ptr() for weight in weights)
        structure.query_eps, structure.key_eps = (norm.eps for norm in norms)
    return structure, weights


def angles(cos: Tensor, sin: Tensor, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both contiguous; raises `ValueError` unless they are [1, tokens, width] of `dtype`."""
    if not cos.shape == sin.shape == (1, tokens, width) or not cos.dtype == sin.dtype == dtype:
        raise ValueError(f"{tokens} tokens with heads of {width} {dtype} are turned by {list(cos.shape)} {cos.dtype}")
    return cos.contiguous(), sin.contiguous()


def _rows(x: Tensor) -> tuple[int, int, int, int, int] | None:
    """`x` as rows [outer, inner, width], and the strides of the first two; None where it cannot be seen so."""
    if x.dtype not in DTYPES or not x.numel() or x.dim() < 1 or x.stride(-1) != 1:
        return None
    width = x.shape[-1]
    if x.is_contiguous():
        return 1, x.numel() // width, width, 0, width
    found: list[tuple[int, int]] = []  # sizes and strides, those that go on where the next begins as one
    for size, stride in zip(x.shape[:-1], x.stride(), strict=False):
        if found and found[-1][1] == size * stride:
            found[-1] = found[-1][0] * size, stride
        elif size > 1:
            found.append((size, stride))
    if len(found) > 2:
        return None
    (outer, outer_stride), (inner, inner_stride) = [(1, 0)] * (2 - len(found)) + found
    return outer, inner, width, outer_stride, inner_stride


def _kind(x: Tensor) -> tuple[int, int]:
    """The last arguments of all kernels here."""
    return DTYPES[x.dtype], torch.get_num_threads()
