"""One buffer for all layers: which layers form a group, how a page is cut, and where each layer's cache lies in it.

A page holds one block of up to S layers, so that pages of all groups have equal bytes and any page serves any group:

             slice 0     slice 1     ...  slice S-1
    page 0 |           |           |     |           |   the null page
    page 1 | layer a0  | layer a1  | ... | layer a9  |   owned by group a
    page 2 | layer b0  | layer b1  | ... | (padding) |   owned by group b

Each slice is contiguous over the pages, so a layout may split keys from values or tile as it likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ConfigError, OutOfMemoryError
from engine.interfaces import AttentionBackend, Domain, KVCache, Platform
from engine.kv.spec import ChunkedSpec, FullSpec, KVCacheSpec, KVGroup, SlidingWindowSpec

_ALIGN = 256
_COST_OF_A_GROUP = 0.02
"""A group costs host work each step; one is worth this share of the buffer lost to padding."""


@dataclass(frozen=True)
class KVPlan:
    """How the buffer is cut.

    Attributes:
        groups: specification and layers of each group.
        slices: S, layers in a page.
        block_bytes: of one layer in a page, padding included.
    """

    groups: tuple[KVGroup, ...]
    slices: int
    block_bytes: int

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.slices * self.block_bytes


def plan_pool(backends: Mapping[str, AttentionBackend], block_size: int, allowed: Domain) -> KVPlan:
    """Group the layers and size the pages.

    Args:
        backends: of each layer that owns a cache, by layer name, in model order.
        block_size: tokens in a block of the layers with the largest tokens; the others get a multiple that fits.
        allowed: block sizes that the platform declared.
    """
    if block_size not in allowed:
        raise ConfigError(f"block_size {block_size} is not one of the platform's block sizes: {allowed}")
    if not backends:
        return KVPlan((), 0, 0)
    block_bytes = max(b.layout(block_size).block_bytes for b in backends.values())
    alike: dict[KVCacheSpec, list[str]] = {}
    for name, backend in backends.items():
        size = _largest_block(backend, block_size, block_bytes, allowed)
        alike.setdefault(_cache_spec(backend, size), []).append(name)
    slices = _slices([len(names) for names in alike.values()])
    groups = [
        KVGroup(spec, tuple(names[i : i + slices]))
        for spec, names in alike.items()
        for i in range(0, len(names), slices)
    ]
    return KVPlan(tuple(groups), slices, -(-block_bytes // _ALIGN) * _ALIGN)


def _cache_spec(backend: AttentionBackend, block_size: int) -> KVCacheSpec:
    spec = backend.spec
    if spec.window is not None and spec.causal:
        return SlidingWindowSpec(block_size, spec.window)
    if spec.chunk is not None:
        return ChunkedSpec(block_size, spec.chunk)
    return FullSpec(block_size)


def _largest_block(backend: AttentionBackend, block_size: int, block_bytes: int, allowed: Domain) -> int:
    """The largest power-of-two multiple of `block_size` whose block fits into `block_bytes`."""
    while 2 * block_size in allowed and backend.layout(2 * block_size).block_bytes <= block_bytes:
        block_size *= 2
    return block_size


def _slices(counts: list[int]) -> int:
    """Layers in a page that waste the least, a group's cost counted in."""

    def cost(s: int) -> float:
        groups = sum(-(-c // s) for c in counts)
        return 1 - sum(counts) / (groups * s) + _COST_OF_A_GROUP * groups

    return min(range(max(counts), 0, -1), key=cost)


class KVPool:
    """The buffer, and every layer's cache in it."""

    def __init__(
        self, plan: KVPlan, backends: Mapping[str, AttentionBackend], platform: Platform, num_pages: int
    ) -> None:
        self._buffer = _allocate(plan.page_bytes * num_pages, platform)
        span = num_pages * plan.block_bytes
        self.caches: dict[str, KVCache] = {
            name: backends[name].layout(group.spec.block_size).bind(self._buffer[i * span : (i + 1) * span], num_pages)
            for group in plan.groups
            for i, name in enumerate(group.layers)
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self._buffer.numel()


def _allocate(nbytes: int, platform: Platform) -> Tensor:
    try:
        return platform.memory().allocate(nbytes)
    except (torch.OutOfMemoryError, RuntimeError, OSError) as error:
        free = platform.device().memory_info().free
        raise OutOfMemoryError(
            f"no room for a KV cache of {nbytes / 2**30:.2f} GiB: {free / 2**30:.2f} GiB are free on "
            f"{platform.device().torch_device}; lower gpu_memory_utilization or kv_cache_memory_bytes"
        ) from error
