"""Layers of experts in Triton: tokens are sorted by expert, and each expert's weights are read once for its tokens.

    ids [N, k] -> route   -> order [S]: the pairs (token, column) by expert, S = N * k
    x          -> product -> [S, I or 2I] in that order -> activate -> product -> [S, hidden] by pair
                                                                    combine    -> [N, hidden]

The usual gate, ``silu(gate) * up``, is part of the first product: a program makes a tile of both halves. Tiles of
weights are copied by descriptor where the device has an instruction for that; those of tokens are gathered by address.

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
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.interfaces import ExpertsMethod, ExpertsSpec, ExpertWeights
from engine_sdk.triton.tuning import DeviceProperties, describable, device_properties


@dataclass(frozen=True)
class _Tile:
    """How a product is cut: rows, columns and depth of a tile, warps of a program, loads in flight."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def _tile(pairs_of_an_expert: float, itemsize: int, halves: int, shared_bytes: int) -> _Tile:
    """Few rows are memory-bound: thin tiles, many programs. Many rows are compute-bound: square tiles.

    Of `halves` tiles of weights a program has each one's columns; as many loads are in flight as there is room for.
    """
    if itemsize > 2:
        tile = _Tile(16 if pairs_of_an_expert <= 16 else 32, 64, 32, 4, 2)
    elif pairs_of_an_expert <= 12:
        tile = _Tile(16, 64, 128, 4, 3)
    elif pairs_of_an_expert <= 32:
        tile = _Tile(32, 128, 128, 4, 3)
    elif pairs_of_an_expert <= 96:
        tile = _Tile(64, 128, 64, 4, 4)
    else:
        tile = _Tile(128, 256, 64, 8, 4)
    tile = replace(tile, columns=tile.columns // halves)
    while (stages := 1 + shared_bytes // ((tile.rows + halves * tile.columns) * tile.depth * itemsize)) == 1:
        tile = replace(tile, columns=tile.columns // 2)  # one load is always being computed
    return replace(tile, num_stages=min(tile.num_stages, stages))


class TritonExperts(ExpertsMethod):
    """Two grouped products over the chosen experts, for any number of tokens; nothing waits for the device.

    Products and biases are summed in fp32 and rounded once, where the gate is fused after it; the weighted sum is in
    fp32, in the order of the columns.
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

        inner = self._product(x, weights.up, weights.up_bias, order, bounds, top_k, halves=2 if self.spec.silu else 1)
        if not self.spec.silu:
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
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        order: Tensor,
        bounds: Tensor,
        top_k: int,
        *,
        halves: int = 1,
        by_pair: bool = False,
    ) -> Tensor:
        """Rows of x times each row's expert: x [N, in] by token to [S, out] in sorted order, or back, `by_pair`.

        Two `halves` of the weight are multiplied at once and combined by the gate.
        """
        pairs, experts = order.shape[0], self.spec.num_experts
        rows, columns = (2, 1) if self.spec.transposed else (1, 2)
        width, depth = weight.shape[rows] // halves, weight.shape[columns]
        out = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
        device = self._device or device_properties(x.device)
        tile = _tile(pairs / experts, x.dtype.itemsize, halves, device.shared_bytes)
        most_tiles = min(pairs, pairs // tile.rows + min(experts, pairs))
        grid = (most_tiles * triton.cdiv(width, tile.columns),)
        by_descriptor = (
            device.tile_copies and not self.spec.transposed and weight.is_contiguous() and describable(weight)
        )
        _multiply[grid](
            x,
            TensorDescriptor.from_tensor(weight.flatten(0, 1), [tile.columns, tile.depth]) if by_descriptor else weight,
            bias,
            out,
            order,
            bounds,
            width,
            depth,
            x.stride(0),
            weight.stride(0),
            weight.stride(rows),
            weight.stride(columns),
            EXPERTS=experts,
            EXPERTS_UP=triton.next_power_of_2(experts),
            TOP_K=top_k,
            BY_PAIR=by_pair,
            BY_DESCRIPTOR=by_descriptor,
            HALVES=halves,
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
def _weights(weight, at, start, within, inside, BY_DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr):
    """A tile [DEPTH, COLUMNS] of weights from depth `start` on: at a row of the descriptor, or at pointers."""
    if BY_DESCRIPTOR:
        tile = weight.load([at, start]).T
    elif EVEN:
        tile = tl.load(at, mask=inside[None, :], other=0.0)
    else:
        tile = tl.load(at, mask=inside[None, :] & within[:, None], other=0.0)
    return tile


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


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
    BY_DESCRIPTOR: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of one expert's product; grid (tiles of rows * tiles of columns).

    Args:
        x: [N, depth] by token, or [S, depth] in sorted order where BY_PAIR.
        weight: [E, HALVES * width, depth] in any strides, or a descriptor of [E * HALVES * width, depth].
        bias: [E, HALVES * width], or None.
        out: [S, width] in sorted order, or by pair where BY_PAIR; of two halves, ``silu(first) * second``.
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

    first_column = (tl.program_id(0) % column_tiles) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    inside = column < width
    k = tl.arange(0, DEPTH)
    x_at = x + source.to(tl.int64)[:, None] * x_row + k[None, :]
    if BY_DESCRIPTOR:
        w_at = expert * (HALVES * width) + first_column
        half = width
    else:
        w_at = weight + expert.to(tl.int64) * w_expert + column[None, :] * w_row + k[:, None] * w_column
        half = width * w_row
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = acc
    for start in range(0, depth, DEPTH):
        within = start + k < depth
        if EVEN:
            a = tl.load(x_at, mask=alive[:, None], other=0.0)
        else:
            a = tl.load(x_at, mask=alive[:, None] & within[None, :], other=0.0)
        acc = _dot(a, _weights(weight, w_at, start, within, inside, BY_DESCRIPTOR, EVEN), acc, UPCAST)
        if HALVES == 2:
            up = _dot(a, _weights(weight, w_at + half, start, within, inside, BY_DESCRIPTOR, EVEN), up, UPCAST)
        x_at += DEPTH
        if not BY_DESCRIPTOR:
            w_at += DEPTH * w_column
    if bias is not None:
        b_at = bias + expert * (HALVES * width) + column
        acc += tl.load(b_at, mask=inside, other=0.0).to(tl.float32)[None, :]
        if HALVES == 2:
            up += tl.load(b_at + width, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HALVES == 2:
        acc = acc / (1 + tl.exp(-acc)) * up
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
