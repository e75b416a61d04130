"""Faults of our own core: the KV manager, the scheduler, the batch and the sampler, patched in the mutated process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from engine_mutation.catalogue import CoreFault, fault

_GREEDY = "test_engine.py::test_greedy"
_SEEDS = "test_engine.py::test_samples_depend_on_seed_and_prompt"
_KV = "tests/test_kv.py"


def instead_of(owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Replace ``owner.name`` by the decorated function, which is given the original first."""

    def take(new: Callable[..., Any]) -> None:
        old = getattr(owner, name)
        setattr(owner, name, functools.wraps(old)(lambda *args, **options: new(old, *args, **options)))

    return take


# Prefix cache and blocks.


@fault("L6", _KV)
class PrefixHitOneBlockLonger(CoreFault):
    """A prefix hit counts a block that was not found."""

    @classmethod
    def patch(cls) -> None:
        from engine.kv.manager import KVCacheManager, Prefix

        @instead_of(KVCacheManager, "match")
        def match(old: Any, self: Any, table: Any, limit: int) -> Any:
            hit = old(self, table, limit)
            more = hit.num_tokens + self._align
            if not hit.num_tokens or more > limit:
                return hit
            return Prefix(more, [[*blocks, blocks[-1]] for blocks in hit.blocks])


@fault("L6", "test_engine.py::test_prefix_hits")
class PrefixHitSkipsOneTokenMore(CoreFault):
    """After a prefix hit the first token that must be computed is taken to be the one before it."""

    @classmethod
    def patch(cls) -> None:
        from engine.batch import Rows

        @instead_of(Rows, "enter")
        def enter(old: Any, self: Any, new: Any) -> None:
            tokens = list(new.token_ids)
            if 0 < new.num_computed < len(tokens):
                tokens[new.num_computed] = tokens[new.num_computed - 1]
            old(self, replace(new, token_ids=tokens))


@fault("L6", _KV)
class SharedBlockFreedAtFirstRelease(CoreFault):
    """A block that two sequences hold is free once the first lets go."""

    @classmethod
    def patch(cls) -> None:
        from engine.kv.allocator import BlockAllocator

        @instead_of(BlockAllocator, "release")
        def release(old: Any, self: Any, blocks: Any) -> None:
            blocks = list(blocks)
            for block in blocks:
                self._refs[block] = min(1, self._refs[block])
            old(self, [block for block in blocks if self._refs[block]])


@fault("L6", _KV)
class PartialBlockShared(CoreFault):
    """A block is shared before it is full, and written on by both."""

    @classmethod
    def patch(cls) -> None:
        from engine.kv.manager import KVCacheManager

        @instead_of(KVCacheManager, "_publish")
        def publish(old: Any, self: Any, table: Any, num_computed: int) -> None:
            old(self, table, num_computed)
            known = min(num_computed, len(table.token_ids))
            for g, spec in enumerate(self._specs):
                index = known // spec.block_size
                if (
                    self._caching
                    and known % spec.block_size
                    and index < len(table.blocks[g])
                    and table.blocks[g][index]
                ):
                    self.allocator.publish(table.blocks[g][index], (self._hash(table, spec.block_size, index), g))


@fault("L6", _KV)
class HashWithoutTheParent(CoreFault):
    """A block's hash covers its own tokens alone, so equal blocks after different beginnings are one."""

    @classmethod
    def patch(cls) -> None:
        from engine.kv.manager import KVCacheManager

        @instead_of(KVCacheManager, "_hash")
        def own(old: Any, self: Any, table: Any, block_size: int, index: int) -> Any:
            return repr((table.root, table.token_ids[index * block_size : (index + 1) * block_size])).encode()


@fault("L6", _KV)
class SaltIgnored(CoreFault):
    """Requests of different salts share blocks."""

    @classmethod
    def patch(cls) -> None:
        from engine.kv.manager import KVCacheManager

        @instead_of(KVCacheManager, "open")
        def opened(old: Any, self: Any, token_ids: list[int], cache_salt: str | None = None) -> Any:
            return old(self, token_ids)


@fault("L6", _KV)
class EvictedBlockStillHit(CoreFault):
    """A block that was evicted and handed out again is still found by its old content."""

    @classmethod
    def patch(cls) -> None:
        from engine.kv.allocator import BlockAllocator

        @instead_of(BlockAllocator, "_forget")
        def forget(old: Any, self: Any, block: int) -> None:
            self._keys[block] = None


@fault("L6", _KV)
class WindowBlockDroppedEarly(CoreFault):
    """A sliding window gives a block up one token too early."""

    @classmethod
    def patch(cls) -> None:
        from engine.kv.spec import SlidingWindowSpec

        @instead_of(SlidingWindowSpec, "num_dead")
        def dead(old: Any, self: Any, num_computed: int) -> Any:
            return old(self, num_computed + 1)


# Scheduler, batch and sampler.


@fault("L6", "test_engine.py::test_preemption")
class PreemptionLosesTheOutput(CoreFault):
    """A sequence that comes back after a preemption is computed again without the last token of its output."""

    @classmethod
    def patch(cls) -> None:
        from engine.batch import Rows

        @instead_of(Rows, "enter")
        def enter(old: Any, self: Any, new: Any) -> None:
            tokens, num_prompt = list(new.token_ids), len(new.request.prompt_token_ids)
            if len(tokens) > num_prompt:
                tokens[-1] = tokens[num_prompt - 1]
            old(self, replace(new, token_ids=tokens))


@fault("L6", "test_engine.py::test_preemption")
class PreemptionLosesTheSamplersState(CoreFault):
    """A sequence that comes back after a preemption has no output yet, for the sampler's penalties."""

    @classmethod
    def patch(cls) -> None:
        from engine.sampler import Sampler

        @instead_of(Sampler, "admit")
        def admit(old: Any, self: Any, row: int, request: Any, token_ids: list[int], *rest: Any) -> None:
            old(self, row, request, token_ids[: len(request.prompt_token_ids)], *rest)


@fault("L6", _SEEDS)
class SeedIgnored(CoreFault):
    """Every request is drawn with the engine's own seed."""

    @classmethod
    def patch(cls) -> None:
        from engine import sampler

        @instead_of(sampler, "uniform")
        def uniform(old: Any, seeds: Any, positions: Any) -> Any:
            return old(np.zeros_like(seeds), positions)


@fault("L6", _SEEDS)
class SeedOfTheRow(CoreFault):
    """What is drawn depends on the row of the step that a request happens to get."""

    @classmethod
    def patch(cls) -> None:
        from engine import sampler

        @instead_of(sampler, "uniform")
        def uniform(old: Any, seeds: Any, positions: Any) -> Any:
            return old(seeds + np.arange(len(seeds), dtype=seeds.dtype), positions)


@fault("L6", _SEEDS)
class SameNumberAtEveryPosition(CoreFault):
    """The random number of a request does not depend on the position, so tokens repeat."""

    @classmethod
    def patch(cls) -> None:
        from engine import sampler

        @instead_of(sampler, "uniform")
        def uniform(old: Any, seeds: Any, positions: Any) -> Any:
            return old(seeds, np.zeros_like(positions))


@fault("L6", _GREEDY)
class LogitsOfTheTokenBefore(CoreFault):
    """Of a request that computes several tokens, the last but one's logits are sampled."""

    @classmethod
    def patch(cls) -> None:
        from engine.batch import BatchBuilder

        @instead_of(BatchBuilder, "build")
        def build(old: Any, self: Any, *step: Any) -> Any:
            batch = old(self, *step)
            for i, at in enumerate(batch.sampled):
                if batch.work[at].num_tokens > 1:
                    batch.logits_index.host[i] -= 1
            return batch


@fault("L6", "test_engine.py::test_output_depends_on_the_prompt")
class PositionsFromZeroOnAChunk(CoreFault):
    """The positions of a chunk begin at zero."""

    @classmethod
    def patch(cls) -> None:
        from engine.batch import BatchBuilder

        @instead_of(BatchBuilder, "build")
        def build(old: Any, self: Any, *step: Any) -> Any:
            batch, at = old(self, *step), 0
            for work in batch.work:
                if work.num_tokens > 1:
                    batch.positions.host[at : at + work.num_tokens] -= work.start
                at += work.num_tokens
            return batch
