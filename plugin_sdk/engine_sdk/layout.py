"""KV layouts: how a block lies in memory, and how plain torch writes tokens into it and takes blocks out of it.

    token-major   | token 0: head 0, head 1, ... | token 1 | ... || the same for values || padding |
    head-major    | head 0: token 0, token 1, ... | head 1 | ... || the same for values || padding |

    tiled, a slice     | keys of block 0 | keys of block 1 | ... || values of block 0 | values of block 1 | ... |
    tiled, a block     | head 0: tile 0, tile 1, ... | head 1: ... | padding |       a tile: L lanes of each token

Shapes: n blocks, N tokens, B tokens a block, K key/value heads, D head size of keys, E head size of values, L lanes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import UnsupportedCapability
from engine.interfaces import KVCache, KVLayout


def to_cache(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as a cache of `dtype` holds it: the nearest number; 8-bit floats saturate, and NaN stays NaN.

    What torch itself makes of numbers that are too large differs by its version and by the format: the largest number,
    infinity, or NaN.
    """
    if dtype.itemsize > 1 or x.dtype == dtype or not dtype.is_floating_point:
        return x.to(dtype)
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def as_bits(x: Tensor) -> Tensor:
    """The same memory, with 8-bit floats as bytes, which torch can index, fill and copy on every device."""
    return x.view(torch.uint8) if x.itemsize == 1 else x


class PagedLayout(KVLayout):
    """A layout that `TorchAttention` runs over. A layout of one's own needs `bind`, `write` and `gather`.

    Args:
        block_size: B.
        num_kv_heads: K.
        head_dim: D.
        v_head_dim: E.
        kv_dtype: of the cache.
    """

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
    def write(self, cache: KVCache, blocks: Tensor, offsets: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write tokens, each at ``offsets[i]`` in block ``blocks[i]``.

        Args:
            cache: what `bind` returned.
            blocks, offsets: int64 [N], on the device.
            keys, values: [N, K, D] and [N, K, E] of any floating dtype, which `to_cache` converts; only their last
                dimension must be dense.
        """

    @abstractmethod
    def gather(self, cache: KVCache, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Copy blocks (int64 [n], on the device) into keys [n, B, K, D] and values [n, B, K, E].

        Both are contiguous and of the cache's dtype.
        """

    def copy_blocks(self, cache: KVCache, src: Tensor, dst: Tensor) -> None:
        """See `KVLayout.copy_blocks`."""
        self.import_blocks(cache, dst, *self.export_blocks(cache, src))

    def export_blocks(self, cache: KVCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVLayout.export_blocks`."""
        keys, values = (
            torch.empty(
                (blocks.shape[0], self.block_size, self.num_kv_heads, dim), dtype=self.kv_dtype, device=blocks.device
            )
            for dim in (self.head_dim, self.v_head_dim)
        )
        self.gather(cache, blocks, keys, values)
        return keys, values

    def import_blocks(self, cache: KVCache, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `KVLayout.import_blocks`."""
        offsets = torch.arange(self.block_size, device=blocks.device)
        tokens = blocks[:, None].expand(-1, self.block_size).flatten()
        self.write(cache, tokens, offsets.repeat(blocks.shape[0]), keys.flatten(0, 1), values.flatten(0, 1))


@dataclass(frozen=True)
class PagedCache:
    """One layer's cache, as views in canonical order whatever the order in memory.

    Attributes:
        keys: [num_blocks, B, K, D]; in tiles [num_blocks, B, K, D / L, L].
        values: [num_blocks, B, K, E]; in tiles [num_blocks, B, K, E / L, L].
    """

    keys: Tensor
    values: Tensor


class BlockLayout(PagedLayout):
    """Keys, then values, within each block; a subclass says in which order. Binds to a `PagedCache`."""

    @abstractmethod
    def _canonical(self, blocks: Tensor, dim: int) -> Tensor:
        """View [num_blocks, B * K * dim], as stored, as [num_blocks, B, K, dim]; `dim` may be split into two."""

    def bind(self, storage: Tensor, num_blocks: int) -> PagedCache:
        """See `KVLayout.bind`. The padded size of a block is a multiple of the dtype's size."""
        blocks = storage.view(self.kv_dtype).view(num_blocks, -1)
        end_keys = self.block_size * self.num_kv_heads * self.head_dim
        end_values = end_keys + self.block_size * self.num_kv_heads * self.v_head_dim
        return PagedCache(
            self._canonical(blocks[:, :end_keys], self.head_dim),
            self._canonical(blocks[:, end_keys:end_values], self.v_head_dim),
        )

    def write(self, cache: KVCache, blocks: Tensor, offsets: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `PagedLayout.write`."""
        for stored, tokens in ((cache.keys, keys), (cache.values, values)):
            split = tokens if stored.dim() == 4 else tokens.unflatten(2, stored.shape[3:])
            as_bits(stored).index_put_((blocks, offsets), as_bits(to_cache(split, stored.dtype)))

    def gather(self, cache: KVCache, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `PagedLayout.gather`."""
        for stored, out in ((cache.keys, keys), (cache.values, values)):
            split = out if stored.dim() == 4 else out.unflatten(3, stored.shape[3:])
            torch.index_select(as_bits(stored), 0, blocks, out=as_bits(split))

    def copy_blocks(self, cache: KVCache, src: Tensor, dst: Tensor) -> None:
        """See `KVLayout.copy_blocks`."""
        for stored in map(as_bits, (cache.keys, cache.values)):
            stored.index_copy_(0, dst, stored.index_select(0, src))

    def import_blocks(self, cache: KVCache, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `KVLayout.import_blocks`."""
        for stored, content in ((cache.keys, keys), (cache.values, values)):
            as_bits(stored).index_copy_(0, blocks, as_bits(content).reshape(-1, *stored.shape[1:]))


class TokenMajor(BlockLayout):
    """[B, K, D] then [B, K, E] a block: a token is written in one piece and a block is gathered in one piece."""

    def _canonical(self, blocks: Tensor, dim: int) -> Tensor:
        return blocks.view(-1, self.block_size, self.num_kv_heads, dim)


class HeadMajor(BlockLayout):
    """[K, B, D] then [K, B, E] a block: a kernel that works head by head reads memory in order."""

    def _canonical(self, blocks: Tensor, dim: int) -> Tensor:
        return blocks.view(-1, self.num_kv_heads, self.block_size, dim).transpose(1, 2)


class Tiled(BlockLayout):
    """Tiles as wide as a chip's vector lanes, keys and values apart: [K, D / L, B, L] and [K, E / L, B, L] a block.

    As matrix units want their operands; Ascend's fractal NZ format is of this kind. The slice is split in the middle,
    keys before values: layers of other shapes that share it split it there too, so the smaller half is padded.

    ``functools.partial(Tiled, lanes=32)`` is a layout for `TorchAttention`.

    Args:
        block_size, num_kv_heads, head_dim, v_head_dim, kv_dtype: as in `PagedLayout`.
        lanes: L, elements of a tile's row.

    Raises:
        UnsupportedCapability: a head size that is no multiple of `lanes`.
    """

    def __init__(
        self,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        kv_dtype: torch.dtype,
        *,
        lanes: int = 16,
    ) -> None:
        super().__init__(block_size, num_kv_heads, head_dim, v_head_dim, kv_dtype)
        for size in (head_dim, v_head_dim):
            if size % lanes:
                raise UnsupportedCapability("head_dims", size, f"tiles have {lanes} lanes; declare multiples of it")
        self.lanes = lanes
        self.block_bytes = 2 * block_size * num_kv_heads * max(head_dim, v_head_dim) * kv_dtype.itemsize

    def _canonical(self, blocks: Tensor, dim: int) -> Tensor:
        shape = (self.num_kv_heads, dim // self.lanes, self.block_size, self.lanes)
        tiles: Tensor = blocks.unflatten(1, shape)
        return tiles.permute(0, 3, 1, 2, 4)

    def bind(self, storage: Tensor, num_blocks: int) -> PagedCache:
        """See `KVLayout.bind`. Half of a block's padded size is a multiple of the dtype's size."""
        keys, values = storage.view(self.kv_dtype).view(2, num_blocks, -1)
        tokens = self.block_size * self.num_kv_heads
        return PagedCache(
            self._canonical(keys[:, : tokens * self.head_dim], self.head_dim),
            self._canonical(values[:, : tokens * self.v_head_dim], self.v_head_dim),
        )
