"""Token-wise operations in plain torch: the references that every platform's own are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.interfaces import OpSet


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in fp32, rounded once before the weight.

    Source: Zhang and Sennrich, 2019, as Transformers' Llama computes it. x [..., D], weight [D]; result as `x`.
    """
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, elementwise."""
    return F.silu(gate) * up


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding with the two halves of the rotated dimensions as pairs (Su et al., 2021; GPT-NeoX order).

    q [..., H, N, D], k [..., K, N, D], cos and sin [..., N, D]; results are new tensors.
    """

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos.unsqueeze(-3) + torch.cat((-second, first), -1) * sin.unsqueeze(-3)

    return turn(q), turn(k)


REFERENCE_OPS = OpSet(rms_norm, silu_and_mul, rotary)
"""All of them; a platform with a faster one answers ``dataclasses.replace(REFERENCE_OPS, rms_norm=mine)``."""
