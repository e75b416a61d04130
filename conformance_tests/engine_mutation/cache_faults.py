"""Cache layouts that lose, mix up or overwrite what blocks hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine_mutation.catalogue import fault
from engine_sdk import BlockLayout, HeadMajor, KVCache, PagedCache, TokenMajor

_COPY = "test_kv_cache.py::test_copy_blocks"
_TRIP = "test_kv_cache.py::test_round_trip"


@fault("L3", _COPY)
class ValuesNotCopied(TokenMajor):
    """A copy of blocks copies keys alone."""

    def copy_blocks(self, cache: KVCache, src: Tensor, dst: Tensor) -> None:
        cache.keys[dst] = cache.keys[src]


@fault("L3", _COPY)
class FirstPairCopied(TokenMajor):
    """Of several blocks to copy only the first is."""

    def copy_blocks(self, cache: KVCache, src: Tensor, dst: Tensor) -> None:
        super().copy_blocks(cache, src[:1], dst[:1])


@fault("L3", _COPY)
class CopiedTheOtherWay(TokenMajor):
    """Source and destination of a copy are swapped."""

    def copy_blocks(self, cache: KVCache, src: Tensor, dst: Tensor) -> None:
        super().copy_blocks(cache, dst, src)


@fault("L3", _COPY)
class LastTokenNotCopied(TokenMajor):
    """A copy of a block misses its last token."""

    def copy_blocks(self, cache: KVCache, src: Tensor, dst: Tensor) -> None:
        for part in (cache.keys, cache.values):
            part[dst, : self.block_size - 1] = part[src, : self.block_size - 1]


@fault("L3", _COPY)
class CopyOfARange(TokenMajor):
    """Blocks to copy are taken for a range that begins at the first one."""

    def copy_blocks(self, cache: KVCache, src: Tensor, dst: Tensor) -> None:
        last = cache.keys.shape[0] - 1
        follow = torch.arange(len(src))
        super().copy_blocks(cache, (src[0] + follow).clamp(max=last), (dst[0] + follow).clamp(max=last))


@fault("L3", _COPY)
class CopyThroughFloat(TokenMajor):
    """A copy goes through fp32 numbers, where some patterns of NaN change."""

    def copy_blocks(self, cache: KVCache, src: Tensor, dst: Tensor) -> None:
        for part in (cache.keys, cache.values):
            part[dst] = part[src].float().nan_to_num().to(part.dtype)


@fault("L3", _TRIP)
class ExportInPoolOrder(TokenMajor):
    """Blocks come out in the order of the pool, not in the order asked for."""

    def export_blocks(self, cache: KVCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        return super().export_blocks(cache, blocks.sort().values)


@fault("L3", _TRIP)
class ExportWidens(TokenMajor):
    """What comes out is fp32, whatever the cache's dtype."""

    def export_blocks(self, cache: KVCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().export_blocks(cache, blocks)
        return keys.float(), values.float()


@fault("L3", _TRIP)
class ExportSwapsKeysAndValues(TokenMajor):
    """Values come out as keys, where both have one size."""

    def export_blocks(self, cache: KVCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().export_blocks(cache, blocks)
        return (values, keys) if keys.shape == values.shape else (keys, values)


@fault("L3", _TRIP)
class ExportReadsHeadMajorAsTokenMajor(HeadMajor):
    """Blocks are stored by head and leave as if they were stored by token."""

    def export_blocks(self, cache: KVCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().export_blocks(cache, blocks)
        return (
            keys.transpose(1, 2).reshape(keys.shape),
            values.transpose(1, 2).reshape(values.shape),
        )


@fault("L3", _TRIP)
class ImportOneBlockOn(TokenMajor):
    """Blocks go in one place after the one named."""

    def import_blocks(self, cache: KVCache, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        super().import_blocks(cache, (blocks + 1) % cache.keys.shape[0], keys, values)

    def export_blocks(self, cache: KVCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        return super().export_blocks(cache, blocks)


@fault("L3", _TRIP)
class ImportCleansNan(TokenMajor):
    """Blocks on their way in are cleaned of NaN and infinity."""

    def import_blocks(self, cache: KVCache, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        clean = [x.float().nan_to_num().to(x.dtype) for x in (keys, values)]
        super().import_blocks(cache, blocks, *clean)


@fault("L3", _TRIP)
class ImportClearsTheRest(TokenMajor):
    """Blocks that are not imported are cleared."""

    def import_blocks(self, cache: KVCache, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        others = torch.ones(cache.keys.shape[0], dtype=torch.bool)
        others[blocks] = False
        cache.keys[others] = torch.zeros((), dtype=keys.dtype)
        super().import_blocks(cache, blocks, keys, values)


@fault("L3", _TRIP)
class KeysOfTheLastHeadSwapped(TokenMajor):
    """With three heads or more, the last two change places on the way in and stay there on the way out."""

    def import_blocks(self, cache: KVCache, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        if self.num_kv_heads > 2:
            keys = torch.cat((keys[:, :, :-2], keys[:, :, -2:].flip(2)), 2)
        super().import_blocks(cache, blocks, keys, values)


@fault("L3", "test_kv_cache.py::test_groups_share_pages")
class BlocksAtTheirOwnPitch(TokenMajor):
    """Blocks lie at multiples of their own bytes, not of the padded size: pages of two groups overlap."""

    def bind(self, storage: Tensor, num_blocks: int) -> PagedCache:
        return super().bind(storage[: num_blocks * self.block_bytes], num_blocks)


class Halves(BlockLayout):
    """All keys, then all values, each with a pitch that a subclass gives."""

    def __init__(self, *shape: Any) -> None:
        super().__init__(*shape)
        self._key_bytes = self.block_size * self.num_kv_heads * self.head_dim * self.kv_dtype.itemsize

    def _canonical(self, blocks: Tensor, dim: int) -> Tensor:
        return blocks.view(-1, self.block_size, self.num_kv_heads, dim)

    def _halves(self, storage: Tensor, num_blocks: int, key_pitch: int, value_pitch: int, begin: int) -> PagedCache:
        flat = storage.view(self.kv_dtype)
        size = self.kv_dtype.itemsize
        key_shape = (num_blocks, self.block_size, self.num_kv_heads, self.head_dim)
        inner = (self.num_kv_heads * self.head_dim, self.head_dim, 1)
        keys = flat.as_strided(key_shape, (key_pitch // size, *inner), flat.storage_offset())
        value_shape = (*key_shape[:3], self.v_head_dim)
        inner = (self.num_kv_heads * self.v_head_dim, self.v_head_dim, 1)
        values = flat.as_strided(value_shape, (value_pitch // size, *inner), flat.storage_offset() + begin // size)
        return PagedCache(keys, values)


@fault("L3", "test_kv_cache.py::test_groups_share_pages")
class HalvesOfTheirOwnSize(Halves):
    """All keys come before all values, split by the layer's own bytes: a layer of another size cuts elsewhere."""

    def bind(self, storage: Tensor, num_blocks: int) -> PagedCache:
        keys = self._key_bytes
        return self._halves(storage, num_blocks, keys, self.block_bytes - keys, num_blocks * keys)


@fault("L3", _TRIP)
class ValuesForgottenInTheSize(TokenMajor):
    """The size of a block counts keys alone, so the values reach into the next block."""

    def __init__(
        self, block_size: int, num_kv_heads: int, head_dim: int, v_head_dim: int, kv_dtype: torch.dtype
    ) -> None:
        super().__init__(block_size, num_kv_heads, head_dim, v_head_dim, kv_dtype)
        self._whole = self.block_bytes
        self.block_bytes = block_size * num_kv_heads * head_dim * kv_dtype.itemsize

    def bind(self, storage: Tensor, num_blocks: int) -> PagedCache:
        pitch = storage.numel() // num_blocks
        keys = self.block_bytes
        flat, size = storage.view(self.kv_dtype), self.kv_dtype.itemsize

        def part(begin: int, dim: int) -> Tensor:
            shape = (num_blocks, self.block_size, self.num_kv_heads, dim)
            strides = (pitch // size, self.num_kv_heads * dim, dim, 1)
            return flat.as_strided(shape, strides, flat.storage_offset() + begin // size)

        return PagedCache(part(0, self.head_dim), part(keys, self.v_head_dim))


@fault("L3", "test_attention.py::test_agrees_with_reference[causal]")
class BindClears(TokenMajor):
    """Binding clears the pool, which another group's blocks may be in."""

    def bind(self, storage: Tensor, num_blocks: int) -> PagedCache:
        storage.zero_()
        return super().bind(storage, num_blocks)


@fault("L3", _TRIP)
class ExportIsAView(TokenMajor):
    """What comes out of a single block is a view of the pool, and changes when the block is written again."""

    def export_blocks(self, cache: KVCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        first = int(blocks[0])
        if torch.equal(blocks, torch.arange(first, first + len(blocks))):
            return cache.keys[first : first + len(blocks)], cache.values[first : first + len(blocks)]
        return super().export_blocks(cache, blocks)


@fault("L3", "test_kv_cache.py::test_no_blocks")
class ExportOfEmptyFails(TokenMajor):
    """Asked for no blocks, it fails instead of returning none."""

    def export_blocks(self, cache: KVCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        if not len(blocks):
            raise RuntimeError("launch of an empty grid")
        return super().export_blocks(cache, blocks)
