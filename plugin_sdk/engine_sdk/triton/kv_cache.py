"""The KV cache's kernels: writing a step's tokens, and copying blocks.

Letters are those of `engine.interfaces.attention`.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.interfaces import KVCache
from engine_sdk.layout import BlockLayout, HeadMajor, PagedCache, TokenMajor

_CHUNK = 8192  # elements of a block that one program copies


@triton.jit
def _saturate(x, LARGEST: tl.constexpr):
    """Numbers beyond LARGEST, the cache's, become it; with None any number is left as it is. NaN stays NaN.

    What a conversion to 8 bits makes of them differs: some devices saturate, others and those in software give NaN.
    """
    if LARGEST is not None:
        x = tl.clamp(x.to(tl.float32), -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _write(
    k,
    v,
    keys,
    values,
    slots,
    k_token,
    k_head,
    v_token,
    v_head,
    keys_block,
    keys_token,
    keys_head,
    values_block,
    values_token,
    values_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Write one token; grid (N,). HEADS, D and E are padded to powers of two."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    heads = tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, D)[None, :]
    e = tl.arange(0, E)[None, :]
    inside_d = (heads < NUM_HEADS) & (d < HEAD_DIM)
    inside_e = (heads < NUM_HEADS) & (e < V_HEAD_DIM)
    key = tl.load(k + token * k_token + heads * k_head + d, mask=inside_d)
    value = tl.load(v + token * v_token + heads * v_head + e, mask=inside_e)
    to_key = keys + block * keys_block + offset * keys_token + heads * keys_head + d
    to_value = values + block * values_block + offset * values_token + heads * values_head + e
    tl.store(to_key, _saturate(key, LARGEST).to(keys.dtype.element_ty), mask=inside_d)
    tl.store(to_value, _saturate(value, LARGEST).to(values.dtype.element_ty), mask=inside_e)


def write_tokens(k: Tensor, v: Tensor, cache: PagedCache, slots: Tensor) -> None:
    """Write keys [N, K, D] and values [N, K, E] where `slots` (int64 [N]) say, converted as `to_cache` does.

    Only the last dimensions must be dense.
    """
    num_tokens, num_heads, head_dim = k.shape
    v_head_dim = v.shape[2]
    if num_tokens:
        _write[(num_tokens,)](
            k,
            v,
            cache.keys,
            cache.values,
            slots,
            *k.stride()[:2],
            *v.stride()[:2],
            *cache.keys.stride()[:3],
            *cache.values.stride()[:3],
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            V_HEAD_DIM=v_head_dim,
            BLOCK_SIZE=cache.keys.shape[1],
            HEADS=triton.next_power_of_2(num_heads),
            D=triton.next_power_of_2(head_dim),
            E=triton.next_power_of_2(v_head_dim),
            LARGEST=torch.finfo(cache.keys.dtype).max if cache.keys.itemsize == 1 else None,
        )


@triton.jit
def _copy(blocks, src, dst, pitch, size, CHUNK: tl.constexpr):
    """Copy a chunk of a block of `size` elements; grid (number of blocks, chunks)."""
    pair = tl.program_id(0)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = at < size
    content = tl.load(blocks + tl.load(src + pair) * pitch + at, mask=inside)
    tl.store(blocks + tl.load(dst + pair) * pitch + at, content, mask=inside)


class _OnePiece(BlockLayout):
    """A layout of `engine_sdk.layout` whose blocks, keys then values in one piece, are copied by one kernel."""

    def copy_blocks(self, cache: KVCache, src: Tensor, dst: Tensor) -> None:
        """See `KVLayout.copy_blocks`."""
        size = self.block_bytes // self.kv_dtype.itemsize
        if src.numel():
            grid = (src.numel(), triton.cdiv(size, _CHUNK))
            _copy[grid](cache.keys, src, dst, cache.keys.stride(0), size, CHUNK=_CHUNK)


class TritonTokenMajor(_OnePiece, TokenMajor):
    """`TokenMajor`: a token is written in one piece."""


class TritonHeadMajor(_OnePiece, HeadMajor):
    """`HeadMajor`: a head's tokens are read in one piece."""
