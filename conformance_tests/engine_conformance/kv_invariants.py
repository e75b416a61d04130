"""What must hold of the KV manager's books at any time, read off its private state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from engine.kv.allocator import BlockAllocator
from engine.kv.manager import BlockTable, KVCacheManager


def check_allocator(allocator: BlockAllocator, referenced: Iterable[int]) -> None:
    """Counts, free pages and cache agree; `referenced` are the entries of all block tables, nulls and repeats too."""
    refs = [0] * len(allocator._refs)
    for block in referenced:
        refs[block] += block > 0
    assert refs == allocator._refs, "reference counts differ from the block tables"
    free = [*allocator._blank, *allocator._idle]
    assert sorted(free) == [i for i in range(1, len(refs)) if refs[i] == 0], "free pages are not the unreferenced"
    assert all(allocator._keys[i] is None for i in allocator._blank)
    assert all(allocator._keys[i] is not None for i in allocator._idle)
    assert allocator._cached == {key: i for i, key in enumerate(allocator._keys) if key is not None}


def check_manager(manager: KVCacheManager, tables: Sequence[BlockTable]) -> None:
    """The same, given all tables; no dead block is held, and no live one was given up."""
    check_allocator(manager.allocator, chain.from_iterable(blocks for table in tables for blocks in table.blocks))
    for table in tables:
        for blocks, dead in zip(table.blocks, table.num_dead, strict=True):
            assert not any(blocks[:dead]), "a dead block is held"
            assert all(blocks[dead:]), "a live block was given up"
