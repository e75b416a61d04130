"""Drawing tokens in plain torch: the reference that every platform's own must equal, token by token.

After one product everything is in integers, whose sums are exact in any order. So the same logits give the same token
on every device, in every row and batch. The rule, for one row with the fields of `DrawInputs`:

1. The level of a token is ``int(min((best - logit) * scale, LAST))``, each operation rounded to fp32; `best` is the
   row's largest logit. Its weight is ``2**(40 - level / LEVELS)``, as `weigh` rounds it; that of `LAST` is 0.
2. Tokens stay whose level is at most `cut` (min_p); of these, those whose logit is at least the `top_k`-th largest of
   the row; of these, those up to the first level at which all up to there weigh ``max(1, total * top_p)``. So tokens
   as likely as the last one kept are kept too.
3. Drawn is the lowest id at which the weights, added in the order of ids, exceed ``total * u``.

A row with a `top_k` of 1, or that is no distribution, gives the first NaN, else the first of its largest logits.
Products with a share are rounded down. The vocabulary is below 2**22, so that all fits into 64 bits.

S rows of logits, R of them at once, V the vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from engine.interfaces import DrawInputs

HALVING = (1488514808, 515782941, 118750211, 19769350, 2029187)
"""c with ``2**-f = 1 - f * (c1 - f * (c2 - f * (c3 - f * (c4 - f * c5))))`` within 1.5e-7 on [0, 1], times 2**31."""

ONE_WEIGHT = 40
"""The likeliest token weighs 2**40."""

_ROWS = 64  # as many at once as keep an accelerator busy, at about 40 bytes for each of their logits
_STRIPES = 16  # on a host, the k likeliest are looked for in the columns of [_STRIPES, V / _STRIPES] with the k largest
_DIGIT, _BUCKETS = 11, 1 << 11  # of a level, which has 22 bits
_BLOCK = 512  # tokens in a block of the two-level search


def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
    """A token for each row of logits [S, V], int64 [S]; see `OpSet.draw`."""
    if inputs is None:
        return logits.max(-1).indices
    return (draw_on_host if logits.device.type == "cpu" else draw_on_device)(logits, inputs)


def weigh(level: Tensor) -> Tensor:
    """Weights, int64, of levels, int32 in 0 to `DrawInputs.LAST`: ``2**(40 - level / 2**16)`` rounded down.

    With n the octaves and f the rest of a level, in 16 bits, that is ``halving(f) << 16 >> n``. Here halvings are
    looked up, as the bits of fp32 numbers that n is taken off the exponent of.
    """
    fraction = (level & (DrawInputs.LEVELS - 1)).flatten()
    found = _halvings(level.device).index_select(0, fraction).view_as(level)
    return found.sub_(level, alpha=1 << 7).view(torch.float32).long()


def halving(fraction: Tensor) -> Tensor:
    """``2**(24 - fraction / 2**16)`` to 24 bits, by `HALVING` in 31-bit fixed point; int64, fraction in [0, 2**16)."""
    made = torch.full_like(fraction, HALVING[-1])
    for coefficient in (*HALVING[-2::-1], 1 << 31):
        made = coefficient - (made * fraction >> 16)
    return (made + (1 << 6)) >> 7


@functools.cache
def _halvings(device: torch.device) -> Tensor:
    """`halving` of each fraction f as the bits of an fp32 number, plus ``f << 7``, which `weigh` takes off again."""
    fraction = torch.arange(DrawInputs.LEVELS)
    exponent = 127 + ONE_WEIGHT - 1
    return ((exponent << 23) + halving(fraction) - (1 << 23) + (fraction << 7)).int().to(device)


def _rows(inputs: DrawInputs, part: slice) -> DrawInputs:
    """The inputs of some rows, each [R, 1]."""
    names = ("top_k", "top_p", "cut", "u", "scale")
    return replace(inputs, **{name: getattr(inputs, name)[part, None] for name in names})


def draw_on_device(logits: Tensor, inputs: DrawInputs) -> Tensor:
    """On an accelerator, which is not asked anything: all steps for all rows."""
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for part in (slice(begin, begin + _ROWS) for begin in range(0, len(logits), _ROWS)):
        x, of = logits[part].float(), _rows(inputs, part)
        best, first = x.max(-1, keepdim=True)
        sane = best.isfinite()
        drawn = _sample(x.where(sane, 0), best.where(sane, 0), of)
        token_ids[part] = torch.where(sane & (of.top_k > 1), drawn, first).squeeze(1)
    return token_ids


def draw_on_host(logits: Tensor, inputs: DrawInputs) -> Tensor:
    """On a host, where looking is free and one row fits in a cache: only what a row needs."""
    token_ids = torch.empty(len(logits), dtype=torch.int64)
    asked = zip(inputs.top_k.tolist(), inputs.top_p.tolist(), inputs.cut.tolist(), strict=True)
    for row, (top_k, top_p, cut) in enumerate(asked):
        x, ids = logits[row], None
        if 1 < top_k <= x.shape[0] // _STRIPES // 8:
            x, ids = _likely(x, top_k)
        x = x.float()
        if top_k == 1 or not (best := x.amax()).isfinite():
            token_ids[row] = logits[row].max(-1).indices
            continue
        limits = {"max_top_k": top_k % logits.shape[1], "any_top_p": top_p < DrawInputs.ONE}
        of = replace(_rows(inputs, slice(row, row + 1)), **limits, any_min_p=cut < DrawInputs.LAST)
        drawn = _sample(x[None], best, of).squeeze()
        token_ids[row] = drawn if ids is None else ids[drawn]
    return token_ids


def _likely(x: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Some of the logits [V], with their ids in rising order: all that are at least the `top_k`-th largest."""
    width = x.shape[0] // _STRIPES
    stripes, rest = x[: _STRIPES * width].view(_STRIPES, width), x[_STRIPES * width :]
    best = stripes.amax(0)
    least = best.topk(top_k).values[-1]  # k logits are at least this large
    columns = (best >= least).logical_or_(best.isnan()).nonzero().squeeze(1)
    ids = torch.arange(_STRIPES)[:, None] * width + columns
    tail = torch.arange(_STRIPES * width, x.shape[0])
    return torch.cat((stripes[:, columns].flatten(), rest)), torch.cat((ids.flatten(), tail))


def _sample(x: Tensor, best: Tensor, inputs: DrawInputs) -> Tensor:
    """Steps 1 to 3 of the rule, int64 [R, 1], for x fp32 [R, V] with its largest logits `best`, which are finite."""
    num_rows, vocab = x.shape
    num_blocks = -(-vocab // _BLOCK)
    padded = torch.full((num_rows, num_blocks * _BLOCK), DrawInputs.LAST, dtype=torch.int32, device=x.device)
    level = padded[:, :vocab]
    level.copy_((best - x).mul_(inputs.scale).clamp_(max=DrawInputs.LAST))
    if inputs.any_min_p:
        level.masked_fill_(level > inputs.cut, DrawInputs.LAST)
    if inputs.max_top_k:
        value = x.topk(inputs.max_top_k, -1).values
        kth = value.gather(-1, (inputs.top_k - 1).clamp_(max=inputs.max_top_k - 1))
        level.masked_fill_((x < kth) & (inputs.top_k <= inputs.max_top_k), DrawInputs.LAST)
    weight = weigh(padded)
    if inputs.any_top_p:
        weight.masked_fill_(padded > _last_level(padded, weight, inputs.top_p), 0)

    # Two steps, each an exact sum: the block that holds the drawn share of the weight, then the token in it.
    blocks = weight.view(num_rows, num_blocks, _BLOCK)
    mass = blocks.sum(-1)
    up_to = mass.cumsum(-1)
    target = _share(up_to[:, -1:], inputs.u)
    block = torch.searchsorted(up_to, target, right=True)
    target -= (up_to - mass).gather(-1, block)
    inner = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1)
    return block * _BLOCK + torch.searchsorted(inner, target, right=True)


def _share(total: Tensor, fraction: Tensor) -> Tensor:
    """``total * fraction`` for total < 2**62 and a fraction in units, rounded down, without overflow.

    Less than `total` for a fraction below 1, so a draw never lands beyond the last token.
    """
    return (total >> 31) * fraction + ((total & (DrawInputs.ONE - 1)) * fraction >> 31)


def _last_level(level: Tensor, weight: Tensor, top_p: Tensor) -> Tensor:
    """The first level, int32 [R, 1], up to which tokens have a share of `top_p`, [R, 1], of the weight, or more.

    A radix descent instead of a sort: the weight of each value of the upper digit, then of the lower digit below it;
    there the first bucket takes what lies above, the last what lies below. level int32 and weight int64 [R, V].
    """
    need = _share(weight.sum(-1, keepdim=True), top_p).clamp_(min=1)
    start = torch.zeros_like(need, dtype=torch.int32)
    for shift in (_DIGIT, 0):
        bucket = ((level - start) >> shift).clamp_(-1, _BUCKETS).add_(1).long()
        mass = weight.new_zeros(len(level), _BUCKETS + 2).scatter_add_(1, bucket, weight).cumsum_(-1)
        start += (torch.searchsorted(mass, need) - 1).int() << shift
    return start
