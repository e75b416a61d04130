"""KV layouts for backends in plain torch: keys, then values, each block in one piece.

    token-major   | token 0: head 0, head 1, ... | token 1 | ... || the same for values || padding |
    head-major    | head 0: token 0, token 1, ... | head 1 | ... || the same for values || padding |

Shapes: B tokens a block, K key/value heads, D head size of keys, E head size of values.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.interfaces import KVCache, KVLayout


@dataclass(frozen=True)
class PagedCache:
    """One layer's cache, as views in canonical order whatever the order in memory.

    Attributes:
        keys: [num_blocks, B, K, D].
        values: [num_blocks, B, K, E].
    """

    keys: Tensor
    values: Tensor


class BlockLayout(KVLayout):
    """Keys, then values, within each block; a subclass says in which order. Binds to a `PagedCache`."""

    def __init__(
        self, block_size: int, num_kv_heads: int, head_dim: int, v_head_dim: int, kv_dtype: torch.dtype
    ) -> None:
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim
        self.kv_dtype = kv_dtype
        self.block_bytes = block_size * num_kv_heads * (head_dim + v_head_dim) * kv_dtype.itemsize

    @abstractmethod
    def _canonical(self, blocks: Tensor, dim: int) -> Tensor:
        """View [num_blocks, B * K * dim], as stored, as [num_blocks, B, K, dim]."""

    def bind(self, storage: Tensor, num_blocks: int) -> PagedCache:
        """See `KVLayout.bind`. The padded size of a block is a multiple of the dtype's size."""
        blocks = storage.view(self.kv_dtype).view(num_blocks, -1)
        end_keys = self.block_size * self.num_kv_heads * self.head_dim
        end_values = end_keys + self.block_size * self.num_kv_heads * self.v_head_dim
        return PagedCache(
            self._canonical(blocks[:, :end_keys], self.head_dim),
            self._canonical(blocks[:, end_keys:end_values], self.v_head_dim),
        )

    def copy_blocks(self, cache: KVCache, src: Tensor, dst: Tensor) -> None:
        """See `KVLayout.copy_blocks`."""
        for blocks in (cache.keys, cache.values):
            blocks.index_copy_(0, dst, blocks.index_select(0, src))

    def export_blocks(self, cache: KVCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVLayout.export_blocks`."""
        return cache.keys.index_select(0, blocks), cache.values.index_select(0, blocks)

    def import_blocks(self, cache: KVCache, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `KVLayout.import_blocks`."""
        cache.keys.index_copy_(0, blocks, keys)
        cache.values.index_copy_(0, blocks, values)


class TokenMajor(BlockLayout):
    """[B, K, D] then [B, K, E] a block: a token is written in one piece and a block is gathered in one piece."""

    def _canonical(self, blocks: Tensor, dim: int) -> Tensor:
        return blocks.view(-1, self.block_size, self.num_kv_heads, dim)


class HeadMajor(BlockLayout):
    """[K, B, D] then [K, B, E] a block: a kernel that works head by head reads memory in order."""

    def _canonical(self, blocks: Tensor, dim: int) -> Tensor:
        return blocks.view(-1, self.num_kv_heads, self.block_size, dim).transpose(1, 2)
