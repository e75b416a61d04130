"""Attention in fp64 on the host, from the contract's words, and how far from it a right backend may be.

Shapes: T queries and L keys of one request, H query heads, K key/value heads, D and E head sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine_sdk import AttentionSpec

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""Half the distance from 1 to the next number: the error of rounding to a dtype, relative."""

TINY = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24, torch.float32: 2.0**-126}
"""What a dtype may lose near zero: fp16's smallest subnormal; else the smallest normal, as devices may flush."""

FP32 = 2.0**-18
"""What fp32 scores, exponentials and sums may lose, relative to the sum of absolute terms."""


@dataclass(frozen=True)
class Expected:
    """The reference of one request, in fp64.

    Attributes:
        out: [T, H, E].
        bound: [T, H, E], the largest error that a right backend makes.
        lse: [T, H].
        lse_bound: [T, H].
    """

    out: Tensor
    bound: Tensor
    lse: Tensor
    lse_bound: Tensor


def cached(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as a cache of `dtype` holds them: the nearest number, or the largest; NaN stays NaN."""
    largest = torch.finfo(dtype).max
    return (x if dtype.itemsize > 1 or x.dtype == dtype else x.clamp(-largest, largest)).to(dtype)


def visible(spec: AttentionSpec, num_queries: int, num_keys: int) -> Tensor:
    """Which keys each query sees, bool [T, L]; the queries are the last T positions."""
    i = torch.arange(num_keys - num_queries, num_keys)[:, None]
    j = torch.arange(num_keys)[None, :]
    seen = (j <= i) if spec.causal else (j < num_keys) & (i >= 0)
    if spec.window is not None:
        seen &= (j > i - spec.window) & (j < i + spec.window)
    if spec.chunk is not None:
        seen &= j // spec.chunk == i // spec.chunk
    return seen


def attend(
    spec: AttentionSpec,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    numerics: Literal["A", "B"] = "A",
) -> Expected:
    """Attention of one request.

    The bound is derived, not chosen. With u the unit of rounding, A = sum p|v|, n keys, eta what is lost near zero and
    delta the largest sum of |q||k| times the scale:
    ``B = u(|o| + A) + (2^-18 + 2^-24 sqrt(n) + 2^-23 (1 + sqrt(D)/4) delta) A + eta/2 n max|v| + 4 eta``: rounding the
    output and the probabilities, fp32 arithmetic, its sums of n terms and its part in the scores (sums of D terms;
    roundings add like random ones, and show in fp32 only), and underflow of probabilities. Class A may err by 2B; class
    B, which rounds the scores to the dtype, by ``max(2B, B + 2u delta A)``. With ALiBi, whose terms may be large, fp32
    also rounds these: ``2^-23 sum p |slope * distance| (|v| + |o|)`` more.

    Args:
        spec: what to compute.
        q: [T, H, D], the last T positions.
        keys: [L, K, D], as the cache stores them.
        values: [L, K, E].
        sinks: [H].
        alibi_slopes: [H], or the table [H, 2r + 1] of a bias by distance.
        numerics: the class that the platform declares.
    """
    num_queries, num_keys = q.shape[0], keys.shape[0]
    group = spec.num_heads // spec.num_kv_heads
    seen = visible(spec, num_queries, num_keys)
    distance = torch.arange(num_keys)[None, :] - torch.arange(num_keys - num_queries, num_keys)[:, None]
    unit, tiny = UNIT[spec.dtype], TINY[spec.dtype]
    columns = []
    for head in range(spec.num_heads):
        q_h = q[:, head].double()
        k_h = keys[:, head // group].double()
        v_h = values[:, head // group].double()
        scores = spec.scale * (q_h @ k_h.T)
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        added: Tensor | float = 0.0
        if alibi_slopes is not None:
            r, row = spec.relative, alibi_slopes[head].double()
            added = row * distance if r is None else row[distance.clamp(-r, r).long() + r]
        scores = scores + added
        scores = scores.masked_fill(~seen, -torch.inf)
        terms = scores if sinks is None else torch.cat((scores, sinks[head].double().expand(num_queries, 1)), 1)
        lse = terms.logsumexp(1, keepdim=True)
        p = torch.exp(scores - lse)
        out = p @ v_h
        mass = p @ v_h.abs()
        num_seen = seen.sum(1, keepdim=True)
        largest = v_h.abs().amax() * num_seen
        delta = (abs(spec.scale) * (q_h.abs() @ k_h.abs().T)).masked_fill(~seen, 0).amax(1, keepdim=True)
        loss = FP32 + 2.0**-24 * num_seen.double().sqrt() + 2.0**-23 * (1 + spec.head_dim**0.5 / 4) * delta
        bias = 2.0**-23 * p[:, :num_keys] * torch.as_tensor(added, dtype=torch.float64).abs()
        bias_sum = bias.sum(1, keepdim=True)
        bound = unit * (out.abs() + mass) + loss * mass + tiny / 2 * largest + 4 * tiny
        bound += bias @ v_h.abs() + bias_sum * out.abs()
        rounded = bound + 2 * unit * delta * mass
        bound = 2 * bound if numerics == "A" else torch.maximum(2 * bound, rounded)
        lse_bound = loss * (1 + lse.abs()) + (0 if numerics == "A" else 2 * unit * delta) + bias_sum
        columns.append((out, bound, lse.squeeze(1), lse_bound.squeeze(1)))
    out, bound, lse, lse_bound = (torch.stack(parts, 1) for parts in zip(*columns, strict=True))
    return Expected(out, bound, lse, lse_bound)


def excess(got: Tensor, want: Tensor, bound: Tensor) -> float:
    """The largest error over its bound; infinite where `got` is not finite. At most 1 is right."""
    error = (got.double().cpu() - want).abs() / bound
    return float(error.nan_to_num(nan=torch.inf).max()) if error.numel() else 0.0
