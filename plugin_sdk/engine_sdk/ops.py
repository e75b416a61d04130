"""Operations in plain torch: the references that every platform's own are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.interfaces import OpSet
from engine_sdk.sampling import draw


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in fp32, rounded once before the weight.

    Source: Zhang and Sennrich, 2019, as Transformers' Llama computes it. x [..., D], weight [D]; result as `x`.
    """
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``rms_norm(x + residual)``, and the sum; all of one shape."""
    total = x + residual
    return rms_norm(total, weight, eps), total


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


def penalise(logits: Tensor, history: Tensor, places: Tensor, penalties: Tensor) -> None:
    """Allowed tokens and penalties, in place; see `OpSet.penalise`."""
    host = logits.device.type == "cpu"  # which may look at what there is to do, and has a small cache
    repeated = not host or bool((penalties[0] != 1).any())
    additive = not host or bool(penalties[1:].any())
    rows = 2 if host else 64
    for (index, slots), some in zip(places.split(rows, 1), penalties.split(rows, 1), strict=True):
        repetition, frequency, presence = some[:, :, None]
        x, past = logits[index], history[slots]
        if repeated:
            x = torch.where(past > 0, torch.where(x > 0, x / repetition, x * repetition), x)
        if additive:
            count = past & (OpSet.PROMPT - 1)
            x.sub_(frequency * count).sub_(presence * count.clamp_(max=1))
        logits[index] = x.masked_fill_(past < 0, -torch.inf)


def logprobs(logits: Tensor, token_ids: Tensor, num: int) -> Tensor:
    """Log probabilities of tokens and of the `num` likeliest; see `OpSet.logprobs`."""
    x = logits.float()
    chosen = x.gather(-1, token_ids[:, None])
    values, ids = x.topk(num, -1)
    found = torch.cat((chosen, values), -1) - x.logsumexp(-1, keepdim=True)
    rank = (x > chosen).sum(-1, keepdim=True) + 1
    return torch.cat((token_ids[:, None].int(), ids.int(), found.view(torch.int32), rank.int()), -1)


REFERENCE_OPS = OpSet(rms_norm, add_rms_norm, silu_and_mul, rotary, draw, penalise, logprobs)
"""All of them; a platform with a faster one answers ``dataclasses.replace(REFERENCE_OPS, rms_norm=mine)``."""
