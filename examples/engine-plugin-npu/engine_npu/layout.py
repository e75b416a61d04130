"""The KV cache as the chip reads it: keys and values apart, both in tiles as wide as its vector lanes.

    slice     | keys of block 0 | keys of block 1 | ... || values of block 0 | values of block 1 | ... |
    a block   | head 0: tile 0, tile 1, ... | head 1: ... | padding |         tile: [B, 16], 16 lanes of B tokens

Shapes: B tokens a block, K key/value heads, D head size, T = D / 16 tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine_sdk import KVCache, KVLayout

BLOCK_SIZE = 128
"""Tokens of a block."""

LANES = 16
"""Elements of a tile's row; head sizes are multiples of it."""


@dataclass(frozen=True)
class TiledCache:
    """One layer's cache: keys and values [num_blocks, K, T, B, 16]."""

    keys: Tensor
    values: Tensor


class TiledLayout(KVLayout):
    """Splits a slice in the middle, keys before values: layers of other shapes in the same slice split it there too."""

    def __init__(self, num_kv_heads: int, head_dim: int, kv_dtype: torch.dtype) -> None:
        self._shape = (num_kv_heads, head_dim // LANES, BLOCK_SIZE, LANES)
        self._dtype = kv_dtype
        self._half_bytes = BLOCK_SIZE * num_kv_heads * head_dim * kv_dtype.itemsize
        self.block_bytes = 2 * self._half_bytes

    def bind(self, storage: Tensor, num_blocks: int) -> TiledCache:
        """See `KVLayout.bind`."""
        halves = storage.view(2, num_blocks, -1)[:, :, : self._half_bytes].view(self._dtype)
        return TiledCache(*halves.unflatten(2, self._shape).unbind(0))

    def copy_blocks(self, cache: KVCache, src: Tensor, dst: Tensor) -> None:
        """See `KVLayout.copy_blocks`."""
        for tiles in (cache.keys, cache.values):
            tiles.index_copy_(0, dst, tiles.index_select(0, src))

    def export_blocks(self, cache: KVCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVLayout.export_blocks`."""
        return _untiled(cache.keys.index_select(0, blocks)), _untiled(cache.values.index_select(0, blocks))

    def import_blocks(self, cache: KVCache, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `KVLayout.import_blocks`."""
        cache.keys.index_copy_(0, blocks, _tiled(keys))
        cache.values.index_copy_(0, blocks, _tiled(values))


def _untiled(tiles: Tensor) -> Tensor:
    """[n, K, T, B, 16] to [n, B, K, T * 16]."""
    return tiles.permute(0, 3, 1, 2, 4).flatten(3)


def _tiled(blocks: Tensor) -> Tensor:
    """[n, B, K, T * 16] to [n, K, T, B, 16]."""
    tiles: Tensor = blocks.unflatten(3, (-1, LANES))
    return tiles.permute(0, 2, 3, 1, 4)
