"""The layout that the kernels read: both operands of a matrix product as tiles want them, see ``attention.cpp``.

    a block   | keys of head 0 | of head 1 | ... | values of head 0 | ... | padding |

    keys      [B' / W, D' / P, W, P]      W is 16, or B' where that is no multiple of 16
    values    [E' / 16, B' / P, 16, P]

P is 2 for bf16 and 1 else. D' and B' are D and B up to a multiple of P, and E' is E up to one of 16; zero beyond D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine_sdk import KVCache, PagedLayout

WIDTH = 16
"""Columns of a panel; E' is a multiple of it."""


@dataclass(frozen=True)
class PackedCache:
    """One layer's cache.

    Attributes:
        raw: [num_blocks, elements of a padded block].
        keys: [num_blocks, K, B' / W, D' / P, W, P].
        values: [num_blocks, K, E' / 16, B' / P, 16, P].
    """

    raw: Tensor
    keys: Tensor
    values: Tensor


class PackedLayout(PagedLayout):
    """Blocks of `block_size` tokens, in pairs where the processor multiplies pairs."""

    def __init__(
        self, block_size: int, num_kv_heads: int, head_dim: int, v_head_dim: int, kv_dtype: torch.dtype
    ) -> None:
        super().__init__(block_size, num_kv_heads, head_dim, v_head_dim, kv_dtype)
        pair = self._pair = 2 if kv_dtype == torch.bfloat16 else 1
        tokens, width = ceil_to(block_size, pair), ceil_to(v_head_dim, WIDTH)
        panel = self._panel = tokens if tokens % WIDTH else WIDTH
        self._keys = (num_kv_heads, tokens // panel, ceil_to(head_dim, pair) // pair, panel, pair)
        self._values = (num_kv_heads, width // WIDTH, tokens // pair, WIDTH, pair)
        self.used = num_kv_heads * tokens * (ceil_to(head_dim, pair) + width)
        self.block_bytes = self.used * kv_dtype.itemsize

    def bind(self, storage: Tensor, num_blocks: int) -> PackedCache:
        """See `KVLayout.bind`."""
        raw = storage.view(self.kv_dtype).view(num_blocks, -1)
        end = math.prod(self._keys)
        return PackedCache(
            raw, raw[:, :end].unflatten(1, self._keys), raw[:, end : self.used].unflatten(1, self._values)
        )

    def write(self, cache: KVCache, blocks: Tensor, offsets: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `PagedLayout.write`."""
        at = blocks, torch.div(offsets, self._panel, rounding_mode="floor"), offsets % self._panel
        found = _cut(keys.to(self.kv_dtype), self._pair)
        cache.keys.permute(0, 2, 4, 1, 3, 5).index_put_(at, found)
        at = blocks, torch.div(offsets, self._pair, rounding_mode="floor"), offsets % self._pair
        found = _cut(values.to(self.kv_dtype), WIDTH)
        cache.values.permute(0, 3, 5, 1, 2, 4).index_put_(at, found)

    def gather(self, cache: KVCache, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `PagedLayout.gather`."""
        found = cache.keys.index_select(0, blocks).permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)
        keys.copy_(found[:, : self.block_size, :, : self.head_dim])
        found = cache.values.index_select(0, blocks).permute(0, 3, 5, 1, 2, 4).flatten(4).flatten(1, 2)
        values.copy_(found[:, : self.block_size, :, : self.v_head_dim])

    def copy_blocks(self, cache: KVCache, src: Tensor, dst: Tensor) -> None:
        """See `KVLayout.copy_blocks`."""
        used = cache.raw[:, : self.used]
        used.index_copy_(0, dst, used.index_select(0, src))


def _cut(x: Tensor, size: int) -> Tensor:
    """[..., n] in pieces, [..., n / size, size], with zeros after the last."""
    pieces: Tensor = torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    return pieces


def ceil_to(size: int, multiple: int) -> int:
    """The least multiple that is not below `size`."""
    return -(-size // multiple) * multiple
