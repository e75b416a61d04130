"""The few largest of short rows in one launch, as routers of experts choose them, and a pass that puts it into a graph.

Torch's own `topk` finds the k-th value, gathers, and sorts: two launches that take longer than a router's product.
"""
# ruff: noqa: N803

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

MOST_COLUMNS = 1024
MOST_CHOSEN = 32

_library = torch.library.Library("engine_sdk", "FRAGMENT")
_library.define("short_topk(Tensor x, int k) -> (Tensor, Tensor)")


def short_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` along the last dimension; of equal values those with lower indices come first.

    Args:
        x: [..., C], fp32, bf16 or fp16, C up to `MOST_COLUMNS`. NaN counts as the largest, as it does for torch.
        k: up to `MOST_CHOSEN`, and up to C.

    Returns:
        values [..., k] of x's dtype, from the largest on, and their indices, int64.
    """
    rows = x.reshape(-1, x.shape[-1])
    values = torch.empty(*x.shape[:-1], k, dtype=x.dtype, device=x.device)
    indices = torch.empty(values.shape, dtype=torch.int64, device=x.device)
    if len(rows):
        width = triton.next_power_of_2(rows.shape[1])
        _topk[(len(rows),)](
            rows, values, indices, rows.shape[1], *rows.stride(), K=k, WIDTH=width, num_warps=1 if width <= 256 else 4
        )
    return values, indices


_library.impl("short_topk", short_topk, "CompositeExplicitAutograd")


@torch.library.register_fake("engine_sdk::short_topk", lib=_library)
def _(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


@triton.jit
def _topk(x, values, indices, columns, x_row, x_column, K: tl.constexpr, WIDTH: tl.constexpr):
    """One row: K times the largest key, which is the value's bits in an order of integers, and the index below it."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < columns
    value = tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0)
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    ordered = tl.where(value != value, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
    gone = tl.full([WIDTH], -0x8000000000000000, tl.int64)
    key = tl.where(inside, key, gone)
    for i in tl.static_range(K):
        at = 0x7FFFFFFF - (tl.max(key, 0) & 0xFFFFFFFF).to(tl.int32)
        chosen = column == at
        tl.store(indices + row * K + i, at.to(tl.int64))
        tl.store(values + row * K + i, tl.sum(tl.where(chosen, value.to(tl.float32), 0.0), 0).to(value.dtype))
        key = tl.where(chosen, gone, key)


class ShortTopK(CustomGraphPass):
    """For torch's compiler, as `post_grad_custom_pre_pass`: `topk` that `short_topk` can do becomes that."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        """See `CustomGraphPass`."""
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default):
            if _fits(*node.args, **node.kwargs):
                node.target = torch.ops.engine_sdk.short_topk.default
                node.args, node.kwargs = node.args[:2], {}

    def uuid(self) -> Any:
        """What compiled graphs are cached by."""
        return get_hash_for_files((__file__,))


def _fits(x: Any, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> bool:
    found: Tensor = x.meta["val"]
    columns = found.shape[-1] if found.dim() else 0
    return (
        isinstance(k, int)
        and isinstance(columns, int)
        and 0 < k <= min(columns, MOST_CHOSEN)
        and columns <= MOST_COLUMNS
        and dim in (-1, found.dim() - 1)
        and largest
        and found.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
