"""The KV cache as the core sees it: blocks of bytes whose inside belongs to the platform.

The core owns one buffer and one free list of pages. A page holds one block of up to S layers; slice s of the buffer is
a contiguous byte tensor with one block per page, and the layers that share slice s (one per KV group) bind it through
their layouts. So a page serves any group, and no layer pays for another's peak.

    slice 0: | page 0 | page 1 | page 2 | ...      layer 0 of every group
    slice 1: | page 0 | page 1 | page 2 | ...      layer 1 of every group
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

KVCache = Any
"""What `KVLayout.bind` returns: tensors in the platform's own shape, opaque to the core."""


class KVLayout(ABC):
    """How blocks of one layer are stored. Shape, tiling, strides and a split of K and V are the platform's own.

    Attributes:
        block_bytes: bytes of one block of one layer. Blocks may be padded up to a larger size chosen by the core.
    """

    block_bytes: int

    @abstractmethod
    def bind(self, storage: Tensor, num_blocks: int) -> KVCache:
        """View a slice of the core's buffer as this layer's cache.

        Args:
            storage: uint8 [num_blocks * padded block bytes] on the device, contiguous, 256-byte aligned, not
                initialised; the padded size is a multiple of 256. Another layout may view the same bytes; the block
                ids in use keep them apart, so every layout must keep block i within bytes that no other block of the
                same padded size uses.
            num_blocks: blocks in the slice, block 0 included, which is never written for a real token.
        """

    @abstractmethod
    def copy_blocks(self, cache: KVCache, src: Tensor, dst: Tensor) -> None:
        """Copy blocks ``src[i] -> dst[i]`` (int64, on the device); source and destination are disjoint."""

    @abstractmethod
    def export_blocks(self, cache: KVCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [n, B, K, D] and values [n, B, K, E] of `blocks` (int64), in the cache's dtype and canonical order."""

    @abstractmethod
    def import_blocks(self, cache: KVCache, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """The inverse of `export_blocks`: a round trip keeps every bit."""
