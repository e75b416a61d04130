"""Kernels, in the device's kernel language: on the device, lengths may be looked at and loops may depend on them.

Shapes: N tokens, R rows of one query each, H query heads, K key/value heads, G = H / K, D head size, B tokens a block,
W the width of the block table, T = D / 16 tiles; keys and values as `engine_sdk.Tiled` binds them.
"""

from __future__ import annotations

import torch
from npu_sim import kernel
from torch import Tensor


@kernel("engine_npu::store_kv(Tensor k, Tensor v, Tensor slots, Tensor(a!) keys, Tensor(b!) values) -> ()")
def store_kv(k: Tensor, v: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write k and v [N, K, D] into tiles [num_blocks, B, K, T, 16] at slots int64 [N]."""
    block, offset = slots // keys.shape[1], slots % keys.shape[1]
    for new, tiles in ((k, keys), (v, values)):
        tiles[block, offset] = new.unflatten(2, (-1, tiles.shape[4])).to(tiles.dtype)


@kernel(
    "engine_npu::attend_decode(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor lengths, Tensor? sinks, "
    "float scale, int? window, int? chunk, float? softcap, Tensor(a!) out, Tensor(b!)? lse) -> ()"
)
def attend_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Attention of one query a row, in one pass over the blocks that a row sees (Milakov and Gimelshein, 2018).

    q [R, H, D]; keys and values [num_blocks, B, K, T, 16]; table int32 [R, W]; lengths int32 [R], rows of length 0 are
    left alone; sinks [H]; out [R, H, D]; lse fp32 [R, H].
    """
    size = keys.shape[1]
    last = lengths.long()[:, None] - 1
    low = torch.zeros_like(last)
    if window is not None:
        low = torch.maximum(low, last - window + 1)
    if chunk is not None:
        low = torch.maximum(low, last // chunk * chunk)
    queries = q.float().unflatten(1, (keys.shape[2], -1)) * scale  # [R, K, G, D]
    sums = torch.zeros_like(queries)
    top = queries.new_full((*queries.shape[:3], 1), -torch.inf)
    total = torch.zeros_like(top)
    for column in range(table.shape[1]):
        at = column * size + torch.arange(size)
        visible = (at >= low) & (at <= last)  # [R, B]
        rows = visible.any(1).nonzero().flatten()
        if not len(rows):
            continue
        hidden = ~visible[rows]
        blocks = table[rows, column].long()
        scores = queries[rows] @ _flat(keys[blocks]).mT  # [r, K, G, B]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(hidden[:, None, None], -torch.inf)
        # What is hidden may be NaN, and NaN times a weight of zero is NaN.
        value = _flat(values[blocks]).masked_fill_(hidden[:, None, :, None], 0)
        higher = torch.maximum(top[rows], scores.amax(-1, keepdim=True))
        weights, fade = torch.exp(scores - higher), torch.exp(top[rows] - higher)
        sums[rows] = sums[rows] * fade + weights @ value
        total[rows] = total[rows] * fade + weights.sum(-1, keepdim=True)
        top[rows] = higher
    logsum = top + total.log()
    if sinks is not None:
        logsum = torch.logaddexp(logsum, sinks.float().view(1, keys.shape[2], -1, 1))
    attended = sums * torch.exp(top - logsum)
    alive = lengths > 0
    out[alive] = attended.flatten(1, 2).to(out.dtype)[alive]
    if lse is not None:
        lse[alive] = logsum.flatten(1)[alive]


def _flat(tiles: Tensor) -> Tensor:
    """[r, B, K, T, 16] to fp32 [r, K, B, T * 16]."""
    return tiles.transpose(1, 2).flatten(3).float()


@kernel("engine_npu::normalise(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()")
def normalise(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Root-mean-square norm over the last dimension, in fp32 and rounded once before the weight."""
    y = x.float()
    torch.mul((y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype), weight, out=out)
