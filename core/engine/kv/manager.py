"""Block tables of sequences over all KV groups, and the prefix cache. No torch here.

A sequence is admitted with the longest prefix that every group has cached, reserves blocks for each step's tokens, and
releases them when it ends or is preempted. Steps run on the device in the order in which they were scheduled, so blocks
may be shared as soon as the step that writes them is scheduled, and handed on as soon as the last that reads them is.
Two sequences may share a block that the same step writes: attention writes all keys and values of a step, then reads.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b

from engine.config import CacheConfig
from engine.kv.allocator import BlockAllocator
from engine.kv.spec import FullSpec, KVGroup


class BlockTable:
    """One sequence's blocks.

    Attributes:
        token_ids: those known so far; the owner appends to it.
        blocks: per group, its blocks in order, dead ones as 0.
        capacity: up to this many tokens `KVCacheManager.reserve` has nothing to do.
    """

    __slots__ = ("blocks", "capacity", "hashes", "num_dead", "num_published", "root", "token_ids")

    def __init__(self, token_ids: list[int], root: bytes, num_groups: int) -> None:
        self.token_ids = token_ids
        self.root = root
        self.hashes: dict[int, list[bytes]] = {}
        self.blocks: list[list[int]]
        self.clear(num_groups)

    def clear(self, num_groups: int) -> None:
        """Hold nothing; hashes stay, since the tokens do."""
        self.blocks = [[] for _ in range(num_groups)]
        self.num_dead = [0] * num_groups
        self.num_published = [0] * num_groups
        self.capacity = 0


@dataclass(frozen=True)
class Prefix:
    """A hit in the prefix cache.

    Attributes:
        num_tokens: that need not be computed.
        blocks: per group, the blocks that hold them, 0 where they are not needed.
    """

    num_tokens: int
    blocks: list[list[int]]


class KVCacheManager:
    """Hands pages to sequences, all groups or none.

    Attributes:
        num_queried: tokens of admitted sequences.
        num_hit: those of them that came from the prefix cache.
    """

    def __init__(self, groups: Sequence[KVGroup], config: CacheConfig) -> None:
        self.allocator = BlockAllocator(config.num_blocks)
        self.num_queried = 0
        self.num_hit = 0
        self._specs = [group.spec for group in groups]
        self._caching = config.enable_prefix_caching and bool(groups)
        self._align = math.lcm(*(spec.block_size for spec in self._specs))
        # full attention first: it bounds the hit at once, and local attention then looks at few blocks
        self._match_order = sorted(range(len(groups)), key=lambda g: not isinstance(self._specs[g], FullSpec))
        self._nothing: list[list[int]] = [[] for _ in groups]

    def open(self, token_ids: list[int], cache_salt: str | None = None) -> BlockTable:
        """An empty table for a sequence; only sequences of equal salt share blocks."""
        return BlockTable(token_ids, blake2b(repr(cache_salt).encode(), digest_size=16).digest(), len(self._specs))

    def max_blocks(self, num_tokens: int, step_tokens: int) -> int:
        """Most pages that a sequence holds while it grows to `num_tokens`, at most `step_tokens` a step."""
        return sum(spec.max_blocks(num_tokens, step_tokens) for spec in self._specs)

    def match(self, table: BlockTable, limit: int) -> Prefix:
        """The longest prefix of at most `limit` tokens that every group has cached."""
        hit = limit if self._caching else 0
        tried = -1
        while hit not in (tried, 0):  # a shorter hit of one group may not be one of another
            tried = hit
            for g in self._match_order:
                hit = self._specs[g].longest_hit(partial(self._page, table, g), hit, self._align)
        blocks = []
        for g, spec in enumerate(self._specs):
            dead = spec.num_dead(hit)
            blocks.append([0] * dead + [self._page(table, g, i) for i in range(dead, hit // spec.block_size)])
        return Prefix(hit, blocks)

    def has_room(self, num_sequences: int, needed: int = 0) -> bool:
        """Whether `needed` pages are free, and after them a block of each group for this many sequences."""
        return needed + num_sequences * len(self._specs) <= self.allocator.num_free

    def admit(self, table: BlockTable, prefix: Prefix, num_tokens: int, num_running: int) -> bool:
        """Fill an empty table with a prefix that was just matched, and reserve up to `num_tokens`.

        Refused unless all known tokens find room, and each of `num_running` others its next block: a sequence that
        enters only to be preempted soon, in the middle of its prompt even, wastes what it computed.
        """
        hits = [block for blocks in prefix.blocks for block in blocks if block]
        needed = self.max_blocks(len(table.token_ids), num_tokens - prefix.num_tokens)
        if not self.has_room(num_running, needed - len(hits) + self.allocator.num_idle(hits)):
            return False
        self.allocator.acquire(hits)
        table.blocks = prefix.blocks
        for g, spec in enumerate(self._specs):
            table.num_published[g] = len(prefix.blocks[g])
            table.num_dead[g] = spec.num_dead(prefix.num_tokens)
        reserved = self.reserve(table, prefix.num_tokens, num_tokens)
        assert reserved is not None
        self.num_queried += len(table.token_ids)
        self.num_hit += prefix.num_tokens
        return True

    def reserve(self, table: BlockTable, num_computed: int, num_tokens: int) -> list[list[int]] | None:
        """Make room for tokens ``[num_computed, num_tokens)``, which the next step computes.

        Blocks that these and later tokens do not need are given up first. Full blocks of known tokens can be hit from
        now on.

        Returns:
            Per group, the blocks appended to the table, not to be changed; None, and nothing reserved, where there are
            too few pages.
        """
        if num_tokens <= table.capacity:
            return self._nothing
        self._drop_dead(table, num_computed)
        wanted = [spec.num_blocks(num_tokens) - len(table.blocks[g]) for g, spec in enumerate(self._specs)]
        if sum(wanted) > self.allocator.num_free:
            return None
        added = [self.allocator.allocate(n) for n in wanted]
        for blocks, new in zip(table.blocks, added, strict=True):
            blocks.extend(new)
        self._publish(table, num_tokens)
        if any(spec.num_dead(num_tokens) > table.num_dead[g] for g, spec in enumerate(self._specs)):
            table.capacity = 0  # the next call has something to give up
        else:
            sizes = (len(table.blocks[g]) * spec.block_size for g, spec in enumerate(self._specs))
            table.capacity = min(sizes, default=sys.maxsize)
        return added

    def release(self, table: BlockTable, num_computed: int) -> None:
        """Give everything up. The sequence's full blocks can be hit until evicted, its last ones first."""
        self._publish(table, num_computed)
        held = (
            (i * spec.block_size, block)
            for spec, blocks in zip(self._specs, table.blocks, strict=True)
            for i, block in enumerate(blocks)
            if block
        )
        self.allocator.release(block for _, block in sorted(held, reverse=True))
        table.clear(len(self._specs))

    def usage(self) -> float:
        """Share of the pages that sequences hold."""
        usable = self.allocator.num_usable
        return (usable - self.allocator.num_free) / max(1, usable)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks, as after a change of weights; refused (False) while a sequence holds any."""
        if self.allocator.num_free < self.allocator.num_usable:
            return False
        self.allocator.reset()
        return True

    def _drop_dead(self, table: BlockTable, num_computed: int) -> None:
        for g, spec in enumerate(self._specs):
            begin, end = table.num_dead[g], spec.num_dead(num_computed)
            if end > begin:
                blocks = table.blocks[g]
                self.allocator.release(blocks[begin:end])
                blocks[begin:end] = [0] * (end - begin)
                table.num_dead[g] = end

    def _publish(self, table: BlockTable, num_computed: int) -> None:
        """Let full blocks be hit, once their tokens are known and scheduled to be computed."""
        if not self._caching:
            return
        known = min(num_computed, len(table.token_ids))
        for g, spec in enumerate(self._specs):
            begin, end = table.num_published[g], known // spec.block_size
            for i in range(begin, end):
                if block := table.blocks[g][i]:
                    self.allocator.publish(block, (self._hash(table, spec.block_size, i), g))
            table.num_published[g] = max(begin, end)

    def _page(self, table: BlockTable, group: int, index: int) -> int:
        """The page that holds a block of the sequence, 0 for none."""
        key = (self._hash(table, self._specs[group].block_size, index), group)
        return self.allocator.lookup(key) or 0

    def _hash(self, table: BlockTable, block_size: int, index: int) -> bytes:
        """The hash of block `index`, chained over all before it, and kept."""
        hashes = table.hashes.setdefault(block_size, [])
        for i in range(len(hashes), index + 1):
            tokens = array("i", table.token_ids[i * block_size : (i + 1) * block_size])
            parent = hashes[-1] if hashes else table.root
            hashes.append(blake2b(parent + tokens.tobytes(), digest_size=16).digest())
        return hashes[index]
