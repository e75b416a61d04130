"""L3: the layout of the KV cache: copies, and the way out of it and back, keep every bit and touch nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine_conformance.cases import bind, certify, members
from engine_sdk import AttentionSpec, Capabilities, KVLayout, Platform


def specs(declared: Capabilities) -> st.SearchStrategy[AttentionSpec]:
    """Layers of the shapes that are declared."""

    def make(heads: int, size: int, v_size: int, dtype: torch.dtype) -> AttentionSpec:
        v_size = v_size if "v_head_dim" in declared.attention else size
        return AttentionSpec(heads, heads, size, v_size, 1.0, next(iter(declared.dtypes)), dtype)

    sizes = members(declared.head_dims, (16, 64, 80))
    dtypes = sorted(declared.kv_dtypes, key=str)
    return st.builds(make, st.integers(1, 4), st.sampled_from(sizes), st.sampled_from((8, 64)), st.sampled_from(dtypes))


def blocks_of(spec: AttentionSpec, count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random bytes as keys and values: every bit pattern, NaN included."""
    generator = torch.Generator().manual_seed(seed)

    def draw(dim: int) -> Tensor:
        shape = (count, size, spec.num_kv_heads, dim * spec.kv_dtype.itemsize)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).view(spec.kv_dtype)

    return draw(spec.head_dim), draw(spec.v_head_dim)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether the bits are the same."""
    return torch.equal(a.contiguous().cpu().view(torch.uint8), b.contiguous().cpu().view(torch.uint8))


def test_round_trip(conformance_platform: Platform, capabilities: Capabilities, examples: int) -> None:
    """Import then export gives the same bits in any order; other blocks keep theirs; canaries and padding too."""
    device = conformance_platform.device().torch_device

    @certify(15 * examples)
    @given(
        specs(capabilities),
        st.sampled_from(members(capabilities.block_sizes, (8, 16, 48))),
        st.integers(0, 2),
        st.randoms(use_true_random=False),
    )
    def drawn(spec: AttentionSpec, size: int, padding: int, rng: st.DataObject) -> None:
        layout = conformance_platform.attention(spec).layout(size)
        num_blocks, count = 12, 5
        buffer, begin, pitch, cache = bind(layout, num_blocks, padding, device)
        before = buffer.clone()
        chosen = rng.sample(range(1, num_blocks), count)  # type: ignore[attr-defined]
        keys, values = (x.to(device) for x in blocks_of(spec, count, size, seed=num_blocks))
        layout.import_blocks(cache, torch.tensor(chosen, device=device), keys, values)

        order = rng.sample(range(count), count)  # type: ignore[attr-defined]
        out_keys, out_values = layout.export_blocks(cache, torch.tensor([chosen[i] for i in order], device=device))
        assert out_keys.dtype == out_values.dtype == spec.kv_dtype
        assert same(out_keys, keys[order])
        assert same(out_values, values[order])
        owned = owned_bytes(layout, spec, size, num_blocks, pitch, torch.tensor(chosen, device=device))
        untouched(buffer, before, begin, owned)

    drawn()


def untouched(buffer: Tensor, before: Tensor, begin: int, owned: Tensor) -> None:
    """Assert that only `owned` bytes, bool [bytes of the pool], changed; the pool begins at `begin`."""
    end = begin + owned.numel()
    assert torch.equal(buffer[:begin], before[:begin]), "bytes before the pool were written"
    assert torch.equal(buffer[end:], before[end:]), "bytes after the pool were written"
    stray = ((buffer[begin:end] != before[begin:end]) & ~owned).nonzero().flatten()
    assert not len(stray), f"{len(stray)} bytes of other blocks changed, the first at {int(stray[0])} of the pool"


def owned_bytes(
    layout: KVLayout, spec: AttentionSpec, size: int, num_blocks: int, pitch: int, blocks: Tensor
) -> Tensor:
    """Which bytes of a pool hold `blocks`, bool [bytes]: a layout may keep a block in several pieces."""
    pool = torch.zeros(num_blocks * pitch, dtype=torch.uint8, device=blocks.device)
    shape = (len(blocks), size, spec.num_kv_heads)
    ones = (
        torch.full((*shape, dim * spec.kv_dtype.itemsize), 0xFF, dtype=torch.uint8).view(spec.kv_dtype)
        for dim in (spec.head_dim, spec.v_head_dim)
    )
    layout.import_blocks(layout.bind(pool, num_blocks), blocks, *(x.to(blocks.device) for x in ones))
    return pool != 0


def test_copy_blocks(conformance_platform: Platform, capabilities: Capabilities, examples: int) -> None:
    """A copy has the source's bits; the source, and all other blocks, keep theirs."""
    device = conformance_platform.device().torch_device

    @certify(15 * examples)
    @given(
        specs(capabilities),
        st.sampled_from(members(capabilities.block_sizes, (8, 16, 48))),
        st.permutations(range(1, 11)),
        st.integers(1, 5),
    )
    def drawn(spec: AttentionSpec, size: int, order: list[int], count: int) -> None:
        layout = conformance_platform.attention(spec).layout(size)
        buffer, begin, pitch, cache = bind(layout, 11, 1, device)
        everything = torch.arange(11, device=device)
        layout.import_blocks(cache, everything, *(x.to(device) for x in blocks_of(spec, 11, size, seed=1)))
        before = buffer.clone()
        source, target = order[:count], order[5 : 5 + count]
        layout.copy_blocks(cache, torch.tensor(source, device=device), torch.tensor(target, device=device))
        for got, want in zip(
            layout.export_blocks(cache, torch.tensor(target, device=device)),
            layout.export_blocks(cache, torch.tensor(source, device=device)),
            strict=True,
        ):
            assert same(got, want)
        owned = owned_bytes(layout, spec, size, 11, pitch, torch.tensor(target, device=device))
        untouched(buffer, before, begin, owned)

    drawn()


@pytest.mark.parametrize("seed", range(3))
def test_groups_share_pages(conformance_platform: Platform, capabilities: Capabilities, seed: int) -> None:
    """Two layouts on the same bytes, each with blocks of its own: neither disturbs the other."""
    device = conformance_platform.device().torch_device
    size = members(capabilities.block_sizes, (16,))[0]
    dim = members(capabilities.head_dims, (64,))[0]
    dtype = next(iter(capabilities.dtypes))
    wide = AttentionSpec(4, 4, dim, dim, 1.0, dtype, dtype)
    narrow = replace(wide, num_heads=1, num_kv_heads=1)
    layouts: list[KVLayout] = [conformance_platform.attention(spec).layout(size) for spec in (wide, narrow)]
    num_blocks = 9
    pitch = max(-(-layout.block_bytes // 256) * 256 for layout in layouts)
    storage = torch.full((num_blocks * pitch,), 0xFF, dtype=torch.uint8, device=device)
    caches = [layout.bind(storage, num_blocks) for layout in layouts]
    ids = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(seed)) + 1
    owned = [ids[:4].to(device), ids[4:].to(device)]
    images = []
    for layout, cache, blocks, spec in zip(layouts, caches, owned, (wide, narrow), strict=True):
        image = tuple(x.to(device) for x in blocks_of(spec, len(blocks), size, seed))
        layout.import_blocks(cache, blocks, *image)
        images.append(image)
    for layout, cache, blocks, image in zip(layouts, caches, owned, images, strict=True):
        assert all(same(got, want) for got, want in zip(layout.export_blocks(cache, blocks), image, strict=True))
