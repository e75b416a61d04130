"""Token-wise operations in Triton, each one launch. Sums and products are in fp32 and rounded once at the end."""
# ruff: noqa: N803

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.interfaces import OpSet
from engine_sdk.ops import REFERENCE_OPS
from engine_sdk.triton.sampling import draw

_TILE = 4096  # elements of a program


@triton.jit
def _rms_norm(x, residual, weight, out, total, num_rows, D, x_row, residual_row, eps,
              ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Rows of `x`, with `residual` added first if there is one; the sum goes to `total`. Grid (ceil(rows / ROWS),)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows) & (d < D)
    y = tl.load(x + rows * x_row + d, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + rows * residual_row + d, mask=inside, other=0.0).to(tl.float32)
        rounded = y.to(total.dtype.element_ty)
        tl.store(total + rows * D + d, rounded, mask=inside)
        y = rounded.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 1) / D + eps)[:, None]
    scale = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    y = y.to(x.dtype.element_ty).to(tl.float32) * scale
    tl.store(out + rows * D + d, y.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `OpSet.rms_norm`; rows have to fit into a program, up to some ten thousand elements."""
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    _norm(x, None, weight, out, None, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `OpSet.add_rms_norm`."""
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm(x, residual, weight, out, total, eps)
    return out, total


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None, eps: float) -> None:
    size = x.shape[-1]
    x = x.reshape(-1, size)
    residual = None if residual is None else residual.reshape(-1, size)
    block = triton.next_power_of_2(size)
    rows = max(1, min(_TILE // block, 32))
    if len(x):
        _rms_norm[(-(-len(x) // rows),)](
            x, residual, weight, out, total, len(x), size, x.stride(0),
            0 if residual is None else residual.stride(0), eps,
            ROWS=rows, BLOCK=block, num_warps=4 if block * rows <= 8192 else 8,
        )  # fmt: skip


@triton.jit
def _silu_and_mul(gate, up, out, num_rows, D, gate_row, up_row, BLOCK: tl.constexpr):
    """Grid (ceil(rows * D / BLOCK),)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = at // D
    d = at - row * D
    inside = row < num_rows
    g = tl.load(gate + row * gate_row + d, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `OpSet.silu_and_mul`; the two may be halves of one tensor."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        gate, up = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        block = 1024
        _silu_and_mul[(-(-out.numel() // block),)](
            gate, up, out, *gate.shape, gate.stride(0), up.stride(0), BLOCK=block, num_warps=4
        )
    return out


@triton.jit
def _rotate(x, out, cos, sin, heads, half, inside, HALF: tl.constexpr, x_head, out_head):
    """Turn all heads of one token; cos and sin fp32 [2 * HALF], of which both halves are used."""
    first = heads * x_head + half
    a = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + first + HALF, mask=inside, other=0.0).to(tl.float32)
    c1 = tl.load(cos + half, mask=half < HALF, other=0.0).to(tl.float32)
    c2 = tl.load(cos + half + HALF, mask=half < HALF, other=0.0).to(tl.float32)
    s1 = tl.load(sin + half, mask=half < HALF, other=0.0).to(tl.float32)
    s2 = tl.load(sin + half + HALF, mask=half < HALF, other=0.0).to(tl.float32)
    to = out + heads * out_head + half
    tl.store(to, (a * c1 - b * s1).to(out.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (b * c2 + a * s2).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotary(
    q, k, cos, sin, q_out, k_out,
    q_batch, q_head, q_token, k_batch, k_head, k_token, cos_batch, cos_token, sin_batch, sin_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    H, K, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn all heads of one token; grid (N, B)."""
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    cos += batch * cos_batch + token * cos_token
    sin += batch * sin_batch + token * sin_token
    half = tl.arange(0, BLOCK)[None, :]
    heads = tl.arange(0, BLOCK_H)[:, None]
    inside = (heads < H) & (half < HALF)
    _rotate(q + batch * q_batch + token * q_token, q_out + batch * q_out_batch + token * q_out_token,
            cos, sin, heads, half, inside, HALF, q_head, q_out_head)  # fmt: skip
    heads = tl.arange(0, BLOCK_K)[:, None]
    inside = (heads < K) & (half < HALF)
    _rotate(k + batch * k_batch + token * k_token, k_out + batch * k_out_batch + token * k_out_token,
            cos, sin, heads, half, inside, HALF, k_head, k_out_head)  # fmt: skip


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `OpSet.rotary`; q and k may have any strides but along their last dimension."""
    shapes = q.shape, k.shape
    q, k = (x.reshape(-1, *x.shape[-3:]) for x in (q, k))
    cos, sin = (x.expand(*shapes[0][:-3], *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (cos, sin))
    made = torch.empty_like(q), torch.empty_like(k)
    batch, num_heads, num_tokens, size = q.shape
    if batch and num_tokens:
        _rotary[(num_tokens, batch)](
            q, k, cos, sin, *made, *q.stride()[:3], *k.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
            *made[0].stride()[:3], *made[1].stride()[:3], num_heads, k.shape[1],
            HALF=size // 2, BLOCK_H=triton.next_power_of_2(num_heads), BLOCK_K=triton.next_power_of_2(k.shape[1]),
            BLOCK=triton.next_power_of_2(size // 2), num_warps=4,
        )  # fmt: skip
    return made[0].view(shapes[0]), made[1].view(shapes[1])


def triton_ops() -> OpSet:
    """All operations that have a kernel here; the others are the references."""
    return dataclasses.replace(
        REFERENCE_OPS,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        silu_and_mul=silu_and_mul,
        rotary=rotary,
        draw=draw,
    )
