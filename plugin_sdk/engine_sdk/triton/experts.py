"""Layers of experts in Triton: tokens are sorted by expert, and each expert's weights are read once for its tokens.

    ids [N, k] -> route   -> order [S]: the pairs (token, column) by expert, S = N * k
    x          -> product -> [S, I or 2I] in that order -> activate -> product -> [S, hidden] by pair
                                                                    combine    -> [N, hidden]

Everything about the routing stays on the device, so a captured step serves any routing. The grid covers the tiles that
the worst routing needs; a program that finds no tile for itself ends at once.

E experts, H hidden, I inner size.
"""

# Constants of kernels are written in capitals.
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.interfaces import ExpertsMethod, ExpertsSpec, ExpertWeights
from engine_sdk.triton.tuning import DeviceProperties, device_properties


@dataclass(frozen=True)
class _Tile:
    """How a product is cut: rows, columns and depth of a tile, warps of a program, loads in flight."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def _tile(pairs_of_an_expert: float, itemsize: int) -> _Tile:
    """Few rows are memory-bound: thin tiles, many programs. Many rows are compute-bound: square tiles."""
    if itemsize > 2:
        return _Tile(16 if pairs_of_an_expert <= 16 else 32, 64, 32, 4, 2)
    if pairs_of_an_expert <= 32:
        return _Tile(16 if pairs_of_an_expert <= 12 else 32, 64, 128, 4, 4)
    if pairs_of_an_expert <= 96:
        return _Tile(64, 128, 64, 4, 4)
    return _Tile(128, 128 if pairs_of_an_expert <= 256 else 256, 64, 8, 3)


def _fit(tile: _Tile, itemsize: int, shared_bytes: int) -> _Tile:
    """The tile with as many loads in flight as there is room for, one always being computed; else a narrower one."""
    stages = 1 + shared_bytes // ((tile.rows + tile.columns) * tile.depth * itemsize)
    if stages == 1:
        return _fit(replace(tile, columns=tile.columns // 2), itemsize, shared_bytes)
    return replace(tile, num_stages=min(tile.num_stages, stages))


class TritonExperts(ExpertsMethod):
    """Two grouped products over the chosen experts, for any number of tokens; nothing waits for the device.

    Products and biases are summed in fp32 and rounded once; the weighted sum is in fp32, in the order of the columns.
    `device` is what the products are cut for; None asks Triton's driver.
    """

    def __init__(self, spec: ExpertsSpec, *, device: DeviceProperties | None = None) -> None:
        self.spec, self._device = spec, device

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        """See `ExpertsMethod.apply`."""
        num_tokens, top_k = expert_ids.shape
        if not num_tokens:
            return torch.empty_like(x)
        pairs, experts = num_tokens * top_k, self.spec.num_experts
        ids = expert_ids.contiguous()
        order = torch.empty(pairs, dtype=torch.int32, device=x.device)
        bounds = torch.empty(2, experts, dtype=torch.int32, device=x.device)  # first pair and number of each expert
        block = min(4096, max(16, triton.next_power_of_2(pairs)))
        _route[(experts,)](ids, order, bounds, pairs, experts, BLOCK=block, num_warps=8 if block > 1024 else 4)

        inner = self._product(x, weights.up, weights.up_bias, order, bounds, top_k, by_pair=False)
        inner = weights.activate(inner)
        made = self._product(inner, weights.down, weights.down_bias, order, bounds, top_k, by_pair=True)
        out = torch.empty(num_tokens, made.shape[1], dtype=x.dtype, device=x.device)
        width = min(1024, triton.next_power_of_2(made.shape[1]))
        grid = (num_tokens, triton.cdiv(made.shape[1], width))
        _combine[grid](
            made, ids, scores, out, made.shape[1], experts, *scores.stride(), TOP_K=top_k, WIDTH=width, num_warps=4
        )
        return out

    def _product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, bounds: Tensor, top_k: int, by_pair: bool
    ) -> Tensor:
        """Rows of x times each row's expert: x [N, in] by token to [S, out] in sorted order, or back, `by_pair`."""
        pairs, experts = order.shape[0], self.spec.num_experts
        rows, columns = (2, 1) if self.spec.transposed else (1, 2)
        out = torch.empty(pairs, weight.shape[rows], dtype=x.dtype, device=x.device)
        device = self._device or device_properties(x.device)
        tile = _fit(_tile(pairs / experts, x.dtype.itemsize), x.dtype.itemsize, device.shared_bytes)
        most_tiles = min(pairs, pairs // tile.rows + min(experts, pairs))
        depth = weight.shape[columns]
        grid = (most_tiles * triton.cdiv(out.shape[1], tile.columns),)
        _multiply[grid](
            x,
            weight,
            bias,
            out,
            order,
            bounds,
            out.shape[1],
            depth,
            x.stride(0),
            weight.stride(0),
            weight.stride(rows),
            weight.stride(columns),
            EXPERTS=experts,
            EXPERTS_UP=triton.next_power_of_2(experts),
            TOP_K=top_k,
            BY_PAIR=by_pair,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            EVEN=depth % tile.depth == 0,
            UPCAST=triton.knobs.runtime.interpret,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return out


@triton.jit
def _route(ids, order, bounds, pairs, experts, BLOCK: tl.constexpr):
    """Program e finds the pairs of expert e, in their order, and puts them behind those of the experts before it.

    ids int64 [S]; order int32 [S]; bounds int32 [2, E]: where an expert's pairs begin, and how many it has.
    """
    expert = tl.program_id(0)
    lower = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        chosen = tl.load(ids + at, mask=at < pairs, other=experts)
        lower += (chosen < expert).to(tl.int32)
    first = tl.sum(lower)
    count = 0
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mine = (tl.load(ids + at, mask=at < pairs, other=experts) == expert).to(tl.int32)
        tl.store(order + first + count + tl.cumsum(mine) - 1, at, mask=mine > 0)
        count += tl.sum(mine)
    tl.store(bounds + expert, first)
    tl.store(bounds + experts + expert, count)


@triton.jit
def _multiply(
    x,
    weight,
    bias,
    out,
    order,
    bounds,
    width,
    depth,
    x_row,
    w_expert,
    w_row,
    w_column,
    EXPERTS: tl.constexpr,
    EXPERTS_UP: tl.constexpr,
    TOP_K: tl.constexpr,
    BY_PAIR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of one expert's product; grid (tiles of rows * tiles of columns).

    Args:
        x: [N, depth] by token, or [S, depth] in sorted order where BY_PAIR.
        weight: [E, width, depth] in any strides.
        bias: [E, width], or None.
        out: [S, width] in sorted order, or by pair where BY_PAIR.
        order, bounds: as `_route` left them.
        x_row, w_expert, w_row, w_column: strides, in elements.
    """
    column_tiles = tl.cdiv(width, COLUMNS)
    tile = tl.program_id(0) // column_tiles
    experts = tl.arange(0, EXPERTS_UP)
    counts = tl.load(bounds + EXPERTS + experts, mask=experts < EXPERTS, other=0)
    tiles = (counts + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles)
    expert = tl.sum((ends <= tile).to(tl.int32))
    if expert >= EXPERTS_UP:
        return
    before = tl.sum(tl.where(experts < expert, tiles, 0))
    row = (tile - before) * ROWS + tl.arange(0, ROWS)
    alive = row < tl.load(bounds + EXPERTS + expert)
    place = tl.load(bounds + expert) + row
    pair = tl.load(order + place, mask=alive, other=0)
    source = place if BY_PAIR else pair // TOP_K
    target = pair if BY_PAIR else place

    column = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    x_at = x + source.to(tl.int64)[:, None] * x_row + k[None, :]
    w_at = weight + expert.to(tl.int64) * w_expert + column[None, :] * w_row + k[:, None] * w_column
    inside = column < width
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            a = tl.load(x_at, mask=alive[:, None], other=0.0)
            b = tl.load(w_at, mask=inside[None, :], other=0.0)
        else:
            a = tl.load(x_at, mask=alive[:, None] & (start + k < depth)[None, :], other=0.0)
            b = tl.load(w_at, mask=inside[None, :] & (start + k < depth)[:, None], other=0.0)
        if UPCAST:
            acc += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
        x_at += DEPTH
        w_at += DEPTH * w_column
    if bias is not None:
        acc += tl.load(bias + expert * width + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    out_at = out + target.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=alive[:, None] & inside[None, :])


@triton.jit
def _combine(made, ids, scores, out, width, experts, s_token, s_column, TOP_K: tl.constexpr, WIDTH: tl.constexpr):
    """The weighted sum of a token's rows; grid (N, tiles of columns). made [N, k, width]; scores [N, k]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for i in range(TOP_K):
        pair = token * TOP_K + i
        exists = tl.load(ids + pair) < experts
        score = tl.load(scores + token * s_token + i * s_column).to(tl.float32)
        part = tl.load(made + pair * width + column, mask=(column < width) & exists, other=0.0).to(tl.float32)
        total += tl.where(exists, score * part, 0.0)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)
