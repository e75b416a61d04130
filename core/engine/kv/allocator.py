"""Pages: reference counts, one free list for all groups, and the prefix cache's map from content to page.

    page 0        the null page, never handed out
    referenced    in block tables; may have a key
    idle          not referenced, but its key can still be hit; evicted when blank pages run out, longest idle first
    blank         not referenced, nothing worth keeping

Each operation costs O(1) a page. No torch here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

BlockKey = tuple[bytes, int]
"""What a block holds: the hash of all tokens up to its end, and the KV group whose layers wrote it."""


class BlockAllocator:
    """Hands out pages ``1 .. num_blocks - 1``."""

    def __init__(self, num_blocks: int) -> None:
        self.num_usable = max(0, num_blocks - 1)
        self._refs = [0] * num_blocks
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._cached: dict[BlockKey, int] = {}
        self._blank = list(range(num_blocks - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out."""
        return len(self._blank) + len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one reference each, at most `num_free`; evicts what has been idle longest."""
        assert count <= self.num_free
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _none = self._idle.popitem(last=False)
                self._forget(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these cached pages."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._idle[block]
            self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each; those without any are evicted in this order."""
        for block in blocks:
            assert self._refs[block] > 0, f"page {block} was released twice"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._keys[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these pages are free, so that `acquire` would take them out of `num_free`."""
        return sum(self._refs[block] == 0 for block in blocks)

    def publish(self, block: int, key: BlockKey) -> None:
        """Let a referenced page be hit as `key`; of two pages with the same content the first stays."""
        assert self._refs[block] > 0
        if key not in self._cached:
            assert self._keys[block] is None, f"page {block} holds something else"
            self._cached[key] = block
            self._keys[block] = key

    def lookup(self, key: BlockKey) -> int | None:
        """The page that holds `key`."""
        return self._cached.get(key)

    def reset(self) -> None:
        """Forget all keys; no page is referenced."""
        assert self.num_free == self.num_usable
        for block in self._idle:
            self._forget(block)
        self._blank.extend(self._idle)
        self._idle.clear()

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        del self._cached[key]
        self._keys[block] = None
