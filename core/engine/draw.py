"""Drawing tokens from logits, to the last bit alike whatever else is in the batch, on any device.

Probabilities are held as integers, ``exp((logit - max) / temperature)`` in fixed point, because sums of integers are
exact in any order: no reduction depends on the number of rows. A token below 2**-44 of the likeliest (with V of 152k)
has probability zero. Random numbers are made on the host from (seed, position).

Names carry shapes: R rows, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNIT_BITS = 31
"""A number in [0, 1] is given as an integer in units of 2**-31: uniform numbers, and top_p."""

_BLOCK = 512  # tokens in a block of the two-level search
_ONE = 0x3F800000  # 1.0 as fp32 bits; those of [0, 1] are 0 to this, in the order of their values


def philox(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox4x32-10: four random words from counter [4, n] and key [2, n].

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; tested against Random123's vectors.
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = counter.astype(np.uint64)
    k0, k1 = key.astype(np.uint64)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low, (p0 >> half) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack((c0, c1, c2, c3)).astype(np.uint32)


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """One uniform number in [0, 1) for each seed and position [n], in units of 2**-31."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    at = positions.astype(np.uint64)
    counter = np.zeros((4, len(at)), np.uint32)
    counter[0], counter[1] = at & low, at >> half
    words = philox(counter, np.stack((seeds & low, seeds >> half)).astype(np.uint32))
    units: NDArray[np.int64] = (words[0] >> np.uint32(1)).astype(np.int64)
    return units


@dataclass
class Filters:
    """What decides the draw of R rows; each [R, 1]. `top_k` is int64, `u` and `top_p` int64 units, the rest fp32."""

    u: Tensor
    top_k: Tensor
    top_p: Tensor
    temperature: Tensor
    min_p: Tensor


def draw_among(x: Tensor, filters: Filters, max_k: int) -> Tensor:
    """Draw among exactly the `top_k` likeliest (ties: lowest ids), in that order.

    `topk` is free to choose among equal logits, so only its values are used: what is drawn is the n-th token with a
    value.
    x fp32 [R, V], every top_k <= max_k <= V; result int64 [R].
    """
    value = x.topk(max_k, -1).values  # [R, K], descending
    w = ((value - value[:, :1]) / filters.temperature).exp_()
    beyond = torch.arange(max_k, device=x.device) >= filters.top_k
    weight = _fixed_point(w, x.shape[-1]).masked_fill_(beyond | (w < filters.min_p), 0)
    before = weight.cumsum(-1) - weight
    need = _share(weight.sum(-1, keepdim=True), filters.top_p).clamp_(min=1)
    cdf = weight.masked_fill_(before >= need, 0).cumsum(-1)
    chosen = torch.searchsorted(cdf, _share(cdf[:, -1:], filters.u), right=True).clamp_(max=max_k - 1)
    chosen_value = value.gather(-1, chosen)
    nth = chosen - (value > chosen_value).sum(-1, keepdim=True)
    hits = (x == chosen_value).cumsum(-1, dtype=torch.int32)
    return torch.searchsorted(hits, (nth + 1).int()).squeeze(-1).clamp_(max=x.shape[-1] - 1)


def draw_from_all(x: Tensor, filters: Filters, *, min_p: bool, top_k: bool, top_p: bool) -> Tensor:
    """Draw from the whole vocabulary in the order of ids, applying the filters that are named.

    Tokens that are as likely as the last one kept by top_k or top_p are kept too. x fp32 [R, V]; result int64 [R].
    """
    w = (x - x.amax(-1, keepdim=True)).div_(filters.temperature).exp_()
    if min_p:
        w.masked_fill_(w < filters.min_p, 0)
    if top_k:
        w.masked_fill_(w < _threshold(w, filters.top_k.new_ones(()).expand_as(w), filters.top_k), 0)
    if top_p:
        weight = _fixed_point(w, x.shape[-1])
        need = _share(weight.sum(-1, keepdim=True), filters.top_p).clamp_(min=1)
        w.masked_fill_(w < _threshold(w, weight, need), 0)

    # Two levels, each an exact sum: the block that holds the drawn share of the mass, then the token in it.
    num_rows, vocab = x.shape
    blocks = torch.zeros(num_rows, -(-vocab // _BLOCK), _BLOCK, dtype=torch.int64, device=x.device)
    blocks.view(num_rows, -1)[:, :vocab] = _fixed_point(w, vocab)
    mass = blocks.sum(-1)
    cdf = mass.cumsum(-1)
    target = _share(cdf[:, -1:], filters.u)
    block = torch.searchsorted(cdf, target, right=True).clamp_(max=blocks.shape[1] - 1)
    target -= (cdf - mass).gather(-1, block)
    inner = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1)
    token = block * _BLOCK + torch.searchsorted(inner, target, right=True)
    return token.squeeze(-1).clamp_(max=vocab - 1)


def _fixed_point(w: Tensor, vocab: int) -> Tensor:
    """Weights in [0, 1] as int64, scaled so that `vocab` of them sum to less than 2**62."""
    return (w * 2.0 ** (62 - vocab.bit_length())).long()


def _share(total: Tensor, fraction: Tensor) -> Tensor:
    """``total * fraction`` for total < 2**62 and a fraction in units, rounded down, without overflow.

    Less than `total` for a fraction below 1, so a draw never lands beyond the last token.
    """
    return (total >> UNIT_BITS) * fraction + ((total & ((1 << UNIT_BITS) - 1)) * fraction >> UNIT_BITS)


def _threshold(w: Tensor, weight: Tensor, need: Tensor) -> Tensor:
    """The largest t such that tokens with ``w >= t`` weigh at least `need` together; fp32 [R, 1].

    A radix descent over the bits of w instead of a sort: one histogram of the high half of the bits, one of the low
    half in the bucket that was found. The first bucket takes what lies above the range, the last what lies below.
    w fp32 [R, V] in [0, 1]; weight int64 [R, V]; need int64 [R, 1].
    """
    depth = _ONE - w.view(torch.int32)  # 0 for w of 1
    start = torch.zeros_like(need, dtype=torch.int32)
    size = 1 << 15
    for shift in (15, 0):
        bucket = (depth - start).bitwise_right_shift_(shift).clamp_(-1, size).add_(1).long()
        mass = weight.new_zeros(len(w), size + 2).scatter_add_(1, bucket, weight).cumsum_(-1)
        start += (torch.searchsorted(mass, need) - 1).int() << shift
    return (_ONE - start).view(torch.float32)
