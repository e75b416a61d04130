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

_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)

_BLOCK = 512  # tokens in a block of the two-level search
_ONE = 0x3F800000  # 1.0 as fp32 bits; those of [0, 1] are 0 to this, in the order of their values


def philox(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10: four random 32-bit words from counter [4, n] and key [2, n], all held as uint64.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; tested against Random123's vectors.
    """
    rounds = np.arange(10, dtype=np.uint64)[:, None, None]
    even, odd = counter[::2], counter[1::2]
    for round_key in (key + rounds * _WEYL) & _LOW:
        product = even * _MULTIPLIERS
        even, odd = (product >> _HALF)[::-1] ^ odd ^ round_key, (product & _LOW)[::-1]
    return np.stack((even[0], odd[0], even[1], odd[1]))


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """One uniform number in [0, 1) for each seed and position [n], in units of 2**-31."""
    counter = np.zeros((4, len(positions)), np.uint64)
    counter[0] = positions  # below 2**32
    units: NDArray[np.int64] = philox(counter, np.stack((seeds & _LOW, seeds >> _HALF)))[0].astype(np.int64) >> 1
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
    weight = _fixed_point(w, x.shape[1]).long().masked_fill_(beyond | (w < filters.min_p), 0)
    before = weight.cumsum(-1) - weight
    need = _share(weight.sum(-1, keepdim=True), filters.top_p).clamp_(min=1)
    cdf = weight.masked_fill_(before >= need, 0).cumsum(-1)
    chosen = torch.searchsorted(cdf, _share(cdf[:, -1:], filters.u), right=True).clamp_(max=max_k - 1)
    chosen_value = value.gather(-1, chosen)
    nth = chosen - (value > chosen_value).sum(-1, keepdim=True)
    hits = (x == chosen_value).cumsum(-1, dtype=torch.int32)
    return torch.searchsorted(hits, (nth + 1).int()).squeeze(-1).clamp_(max=x.shape[1] - 1)


def draw_from_all(x: Tensor, filters: Filters, *, min_p: bool, top_k: bool, top_p: bool) -> Tensor:
    """Draw from the whole vocabulary in the order of ids, applying the filters that are named.

    Tokens that are as likely as the last one kept by top_k or top_p are kept too. x fp32 [R, V]; result int64 [R].
    """
    w = (x - x.amax(-1, keepdim=True)).div_(filters.temperature).exp_()
    if min_p:
        w.masked_fill_(w < filters.min_p, 0)
    if top_k:
        w.masked_fill_(w < _threshold(w, filters.top_k.new_ones(()).expand_as(w), filters.top_k), 0)
    num_rows, vocab = x.shape
    blocks = torch.zeros(num_rows, -(-vocab // _BLOCK), _BLOCK, dtype=torch.int64, device=x.device)
    weight = blocks.view(num_rows, -1)[:, :vocab]
    weight.copy_(_fixed_point(w, vocab))
    if top_p:
        need = _share(weight.sum(-1, keepdim=True), filters.top_p).clamp_(min=1)
        weight.masked_fill_(w < _threshold(w, weight, need), 0)

    # Two levels, each an exact sum: the block that holds the drawn share of the mass, then the token in it.
    mass = blocks.sum(-1)
    cdf = mass.cumsum(-1)
    target = _share(cdf[:, -1:], filters.u)
    block = torch.searchsorted(cdf, target, right=True).clamp_(max=blocks.shape[1] - 1)
    target -= (cdf - mass).gather(-1, block)
    inner = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1)
    token = block * _BLOCK + torch.searchsorted(inner, target, right=True)
    return token.squeeze(-1).clamp_(max=vocab - 1)


def _fixed_point(w: Tensor, vocab: int) -> Tensor:
    """Weights in [0, 1], scaled so that the integer parts of `vocab` of them sum to less than 2**62."""
    return w * 2.0 ** (62 - vocab.bit_length())


def _share(total: Tensor, fraction: Tensor) -> Tensor:
    """``total * fraction`` for total < 2**62 and a fraction in units, rounded down, without overflow.

    Less than `total` for a fraction below 1, so a draw never lands beyond the last token.
    """
    return (total >> UNIT_BITS) * fraction + ((total & ((1 << UNIT_BITS) - 1)) * fraction >> UNIT_BITS)


def _threshold(w: Tensor, weight: Tensor, need: Tensor) -> Tensor:
    """The largest t such that tokens with ``w >= t`` weigh at least `need` together; fp32 [R, 1].

    A radix descent over the 30 bits of w instead of a sort: a histogram of the highest digit, then of the next one in
    the bucket that was found. The first bucket takes what lies above the range, the last what lies below.
    w fp32 [R, V] in [0, 1]; weight int64 [R, V]; need int64 [R, 1].
    """
    depth = _ONE - w.view(torch.int32)  # 0 for w of 1
    start = torch.zeros_like(need, dtype=torch.int32)
    digit = 15 if w.shape[1] > 1 << 14 else 10  # the histogram should not be larger than the vocabulary
    for shift in range(30 - digit, -1, -digit):
        bucket = (depth - start).bitwise_right_shift_(shift).clamp_(-1, 1 << digit).add_(1).long()
        mass = weight.new_zeros(len(w), (1 << digit) + 2).scatter_add_(1, bucket, weight).cumsum_(-1)
        start += (torch.searchsorted(mass, need) - 1).int() << shift
    return (_ONE - start).view(torch.float32)
