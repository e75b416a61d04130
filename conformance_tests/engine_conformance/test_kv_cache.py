"""L3: the layout of the KV cache: copies, and the way out of it and back, keep every bit and touch nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor

from engine_conformance.arena import Arena, aligned, bind, prepare, run
from engine_conformance.cases import Case, Row, Scale, block, dtypes, layer, members, of_8_bits
from engine_conformance.reference import attend, cached, excess
from engine_sdk import AttentionBatch, AttentionSpec, Capabilities, KVLayout, Platform, UnsupportedCapability


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


def test_round_trip(conformance_platform: Platform, capabilities: Capabilities, scale: Scale) -> None:
    """Import then export gives the same bits in any order; other blocks keep theirs; canaries and padding too."""
    device = conformance_platform.device().torch_device

    @scale.certify(15)
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

        image = buffer.clone()
        order = rng.sample(range(count), count)  # type: ignore[attr-defined]
        out_keys, out_values = layout.export_blocks(cache, torch.tensor([chosen[i] for i in order], device=device))
        assert out_keys.dtype == out_values.dtype == spec.kv_dtype
        assert same(out_keys, keys[order])
        assert same(out_values, values[order])
        assert torch.equal(buffer, image), "reading changed the cache"
        shape = (count, size, spec.num_kv_heads)
        assert (tuple(out_keys.shape), tuple(out_values.shape)) == ((*shape, spec.head_dim), (*shape, spec.v_head_dim))
        owned = owned_bytes(layout, spec, size, num_blocks, pitch, torch.tensor(chosen, device=device))
        untouched(buffer, before, begin, owned)

        # All that a cache knows lies in the storage, and what was read is a copy.
        again = layout.bind(buffer[begin : begin + num_blocks * pitch], num_blocks)
        for got, want in zip(
            layout.export_blocks(again, torch.tensor(chosen, device=device)), (keys, values), strict=True
        ):
            assert same(got, want)
        buffer.fill_(0)
        assert same(out_keys, keys[order])
        assert same(out_values, values[order])

    drawn()


def test_block_bytes(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """A block holds its tokens and no fewer bytes; a layout asked for twice is the same; sizes apart do not mix."""
    for dtype in sorted(capabilities.kv_dtypes, key=str):
        for size in members(capabilities.block_sizes, (8, 16, 48)):
            dim = members(capabilities.head_dims, (64,))[0]
            spec = AttentionSpec(4, 2, dim, dim, 1.0, next(iter(capabilities.dtypes)), dtype)
            backend = conformance_platform.attention(spec)
            first, second = backend.layout(size), backend.layout(size)
            assert first.block_bytes == second.block_bytes >= size * 2 * 2 * dim * dtype.itemsize
            assert isinstance(first.block_bytes, int)


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
    """Which bytes of a pool hold `blocks`, bool [bytes]: a layout may keep a block in several pieces, with padding."""
    everything = torch.arange(num_blocks, device=blocks.device)
    owned, of_others = (
        _written(layout, spec, size, num_blocks * pitch, num_blocks, chosen)
        for chosen in (blocks, everything[~torch.isin(everything, blocks)])
    )
    assert not (owned & of_others).any(), "two blocks have bytes in common"
    return owned


def _written(layout: KVLayout, spec: AttentionSpec, size: int, length: int, num_blocks: int, blocks: Tensor) -> Tensor:
    """Which of a pool's `length` bytes an import of `blocks` writes, be it ones or a layout's zeros between them."""
    pool = aligned(length, 0x5A, blocks.device)
    shape = (len(blocks), size, spec.num_kv_heads)
    ones = (
        torch.full((*shape, dim * spec.kv_dtype.itemsize), 0xFF, dtype=torch.uint8).view(spec.kv_dtype)
        for dim in (spec.head_dim, spec.v_head_dim)
    )
    layout.import_blocks(layout.bind(pool, num_blocks), blocks, *(x.to(blocks.device) for x in ones))
    return pool != 0x5A


def test_copy_blocks(conformance_platform: Platform, capabilities: Capabilities, scale: Scale) -> None:
    """A copy has the source's bits; the source, and all other blocks, keep theirs."""
    device = conformance_platform.device().torch_device

    @scale.certify(15)
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


def test_groups_share_pages(conformance_platform: Platform, capabilities: Capabilities, scale: Scale) -> None:
    """Layouts of all shapes on the same bytes, each with blocks of its own: none disturbs another."""
    device = conformance_platform.device().torch_device

    @scale.certify(40)
    @given(
        st.lists(specs(capabilities), min_size=2, max_size=3),
        st.lists(st.sampled_from(members(capabilities.block_sizes, (8, 16, 32))), min_size=3, max_size=3),
        st.integers(0, 3),
        st.permutations(range(1, 19)),
        st.integers(0, 2**31),
    )
    def drawn(layers: list[AttentionSpec], sizes: list[int], padding: int, order: list[int], seed: int) -> None:
        layouts = [conformance_platform.attention(spec).layout(n) for spec, n in zip(layers, sizes, strict=False)]
        num_blocks = 19
        # The padded size is the core's choice, and more than any of them needs.
        pitch = max(-(-layout.block_bytes // 256) * 256 for layout in layouts) + 256 * padding
        storage = aligned(num_blocks * pitch, 0xFF, device)
        caches = [layout.bind(storage, num_blocks) for layout in layouts]
        owned = [torch.tensor(order[i :: len(layouts)], device=device) for i in range(len(layouts))]
        images = []
        for spec, size, blocks in zip(layers, sizes, owned, strict=False):
            images.append([x.to(device) for x in blocks_of(spec, len(blocks), size, seed)])
        for index in (*range(len(layouts)), 0):  # the first is written again, over nothing of the others
            layouts[index].import_blocks(caches[index], owned[index], images[index][0], images[index][1])
        for layout, cache, blocks, image in zip(layouts, caches, owned, images, strict=True):
            for got, want in zip(layout.export_blocks(cache, blocks), image, strict=True):
                assert same(got, want), "another layer's blocks were written"

    drawn()


def test_no_blocks(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """To move no blocks at all moves none."""
    device, spec = conformance_platform.device().torch_device, layer(capabilities)
    layout = conformance_platform.attention(spec).layout(block(capabilities))
    buffer, _, _, cache = bind(layout, 4, 0, device)
    before, none = buffer.clone(), torch.zeros(0, dtype=torch.int64, device=device)
    keys, values = layout.export_blocks(cache, none)
    assert keys.shape == values.shape == (0, block(capabilities), spec.num_kv_heads, spec.head_dim)
    layout.import_blocks(cache, none, keys, values)
    layout.copy_blocks(cache, none, none)
    assert torch.equal(buffer, before)


def test_swap_round_trip(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Out to the host, the pool overwritten, and back into other blocks: the next decode has the same bits."""
    for dtype in dtypes(capabilities):
        swaps(conformance_platform, capabilities, layer(capabilities, dtype=dtype))


def swaps(platform: Platform, declared: Capabilities, spec: AttentionSpec) -> None:
    """Assert that a decode gives the same bits after its blocks were on the host and came back into others."""
    device, size = platform.device(), block(declared)
    backend = platform.attention(spec)
    case = Case(spec, size, (Row(2 * size + 1, 1), Row(size - 1, 1)), seed=3, spare_blocks=8)
    stayed, moved = (prepare(backend, case, declared, device.torch_device) for _ in range(2))
    want, _ = run(backend, stayed)
    held = torch.tensor(owned_blocks(moved), device=device.torch_device)
    out = tuple(x.cpu() for x in moved.layout.export_blocks(moved.cache, held))
    free = torch.tensor(sorted(set(range(1, moved.num_blocks)) - set(held.tolist())))
    there = free[torch.randperm(len(free), generator=torch.Generator().manual_seed(0))[: len(held)]]
    there = there.to(device.torch_device)
    moved.buffer[moved.pool] = 0xFF
    moved.layout.import_blocks(moved.cache, there, *(x.to(device.torch_device) for x in out))
    new_id = torch.zeros(moved.num_blocks, dtype=torch.int64, device=device.torch_device)
    new_id[held] = there
    slots, table = moved.batch.slots, moved.batch.block_table
    moved.batch = replace(
        moved.batch, block_table=new_id[table.long()].int(), slots=new_id[slots // size] * size + slots % size
    )
    got, _ = run(backend, moved)
    assert torch.equal(got, want) if declared.deterministic else torch.allclose(got, want), (spec.dtype, spec.kv_dtype)


@of_8_bits
def test_fp8_blocks(
    conformance_platform: Platform,
    capabilities: Capabilities,
    kv_dtype: torch.dtype,
    scale: Scale,
    record_property: Callable[[str, object], None],
) -> None:
    """Blocks of 8 bits are about half as large as those of 16, swap, and serve sequences in any order."""
    if kv_dtype not in capabilities.kv_dtypes:
        with pytest.raises(UnsupportedCapability):
            conformance_platform.attention(replace(layer(capabilities), kv_dtype=kv_dtype))
        record_property("rejected", f"kv_dtypes.{str(kv_dtype).removeprefix('torch.')}")
        return
    wide = layer(capabilities)
    spec = replace(wide, kv_dtype=kv_dtype)
    if wide.kv_dtype in capabilities.kv_dtypes:
        more, few = (conformance_platform.attention(s).layout(block(capabilities)).block_bytes for s in (wide, spec))
        assert few <= 0.75 * more, f"a block has {few} bytes in 8 bits, and {more} in 16"
    swaps(conformance_platform, capabilities, spec)
    run_state_machine_as_test(
        partial(Sequences, conformance_platform, capabilities, wide.dtype, kv_dtype),  # type: ignore[arg-type]
        settings=settings(scale.certify(20), stateful_step_count=25),
    )


def owned_blocks(arena: Arena) -> list[int]:
    """The blocks of all requests."""
    return sorted({block for request in arena.requests for block in request.blocks})


def test_copies_come_in_order(
    conformance_platform: Platform, capabilities: Capabilities, record_property: Callable[[str, object], None]
) -> None:
    """Compute, swap out, overwrite, swap in and compute again with no wait between: each sees what came before."""
    device, size = conformance_platform.device(), block(capabilities)
    spec = layer(capabilities)
    backend = conformance_platform.attention(spec)
    case = Case(spec, size, (Row(size, size),), seed=4, spare_blocks=4)
    arena, reference = (prepare(backend, case, capabilities, device.torch_device) for _ in range(2))
    want, _ = run(backend, reference)
    blocks = torch.tensor(owned_blocks(reference), device=device.torch_device)
    plain = [x.clone() for x in reference.layout.export_blocks(reference.cache, blocks)]
    junk = [torch.full_like(x, 3.0) for x in plain]
    hosts = [device.host_buffer(tuple(x.shape), x.dtype) for x in plain]
    q, k, v = arena.tokens
    plan, out = backend.plan(arena.batch), torch.zeros_like(q)
    device.synchronize()

    busy = keep_busy(device.torch_device, capabilities)
    backend.forward(q, k, v, arena.cache, plan, out)
    for host, x in zip(hosts, arena.layout.export_blocks(arena.cache, blocks), strict=True):
        host.copy_(x, non_blocking=True)
    event = device.event()
    event.record()
    early = any(not same(host, x) for host, x in zip(hosts, plain, strict=True))
    arena.layout.import_blocks(arena.cache, blocks, *junk)
    spoiled = torch.zeros_like(q)
    backend.forward(q, None, None, arena.cache, plan, spoiled)
    event.synchronize()
    assert all(same(host, x) for host, x in zip(hosts, plain, strict=True)), "swapped out before the compute ended"
    arena.layout.import_blocks(arena.cache, blocks, *(x.to(device.torch_device, non_blocking=True) for x in hosts))
    again = torch.zeros_like(q)
    backend.forward(q, None, None, arena.cache, plan, again)
    device.synchronize()
    del busy
    assert torch.equal(out, want), "the first result"
    assert not torch.equal(spoiled, want), "the overwritten blocks were not read"
    assert torch.equal(again, want) if capabilities.deterministic else torch.allclose(again, want), "the last result"
    if capabilities.asynchronous and not early:
        record_property("inconclusive", "the device was done before the host could look: nothing was out of order")


def keep_busy(device: torch.device, declared: Capabilities) -> Tensor:
    """Launch work that takes a while, so that what is launched next is late; nothing where calls return when done."""
    x = torch.ones(1024, 1024, device=device) / 1024
    for _ in range(30 if declared.asynchronous else 0):
        x = x @ x
    return x


class Sequences(RuleBasedStateMachine):
    """Sequences that grow, fork, swap and end in one pool, against a model that holds every token in a dictionary.

    Blocks are shared by reference count; who writes into a shared block copies it first. Keys and values are numbers
    that the cache holds exactly.
    """

    def __init__(
        self, platform: Platform, declared: Capabilities, dtype: torch.dtype, kv_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.device = platform.device()
        self.declared = declared
        self.size = min(members(declared.block_sizes, (4, 8, 16)))
        dim = min(members(declared.head_dims, (16, 32, 64)))
        self.spec = AttentionSpec(2, 1, dim, dim, dim**-0.5, dtype, kv_dtype or dtype)
        self.backend = platform.attention(self.spec)
        self.layout = self.backend.layout(self.size)
        self.num_blocks = 14
        self.buffer, _, _, self.cache = bind(self.layout, self.num_blocks, 0, self.device.torch_device)
        if not declared.nan_safe:  # what is not written yet may be stale, but must be finite
            stale = torch.full((self.num_blocks, self.size, 1, dim), 50.0, device=self.device.torch_device)
            images = (x.to(self.spec.kv_dtype) for x in (stale, -stale))
            self.layout.import_blocks(self.cache, self.ids(list(range(self.num_blocks))), *images)
        self.refs = [0] * self.num_blocks
        self.tables: dict[int, list[int]] = {}
        self.tokens: dict[int, tuple[Tensor, Tensor]] = {}  # of each sequence, keys and values [length, 1, D]
        self.swapped: dict[int, tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]] = {}
        self.count = 0

    def take(self, count: int) -> list[int]:
        """Blocks that nobody has, the lowest last, so that blocks are used again soon and in no order."""
        free = [i for i in range(self.num_blocks - 1, 0, -1) if not self.refs[i]][-count:] if count else []
        for i in free:
            self.refs[i] = 1
        return free

    def num_free(self) -> int:
        """Blocks that nobody has."""
        return sum(not r for r in self.refs[1:])

    def ids(self, blocks: list[int]) -> Tensor:
        """Block ids on the device."""
        return torch.tensor(blocks, dtype=torch.int64, device=self.device.torch_device)

    def draw(self, count: int, heads: int) -> Tensor:
        """New values."""
        self.count += 1
        generator = torch.Generator().manual_seed(self.count)
        drawn = torch.randn(count, heads, self.spec.head_dim, generator=generator).to(self.spec.dtype)
        return cached(drawn, self.spec.kv_dtype).to(self.spec.dtype)

    @rule(news=st.lists(st.integers(1, 9), min_size=1, max_size=3), fresh=st.booleans())
    def step(self, news: list[int], fresh: bool) -> None:
        """Several sequences grow in one step, decodes first; a new one may begin."""
        names = sorted(self.tables)[: len(news) - fresh]
        if fresh or not names:
            self.count += 1
            names.append(self.count)
            self.tables[self.count] = []
            none = torch.zeros(0, 1, self.spec.head_dim, dtype=self.spec.dtype)
            self.tokens[self.count] = (none, none)
        work = []
        for name, new in sorted(zip(names, news, strict=False), key=lambda pair: pair[1] > 1):
            if self.room_for(name, new):
                work.append((name, new))
        if work:
            self.compute(work)
        for name in [n for n, (keys, _) in self.tokens.items() if not len(keys)]:
            del self.tables[name], self.tokens[name]

    def room_for(self, name: int, new: int) -> bool:
        """Reserve blocks for `new` tokens, and make the last block this sequence's own."""
        table, length = self.tables[name], len(self.tokens[name][0])
        wanted = -(-(length + new) // self.size) - len(table)
        shared = length % self.size > 0 and self.refs[table[-1]] > 1
        if wanted + shared > self.num_free():
            return False
        if shared:
            (own,) = self.take(1)
            self.layout.copy_blocks(self.cache, self.ids([table[-1]]), self.ids([own]))
            self.refs[table[-1]] -= 1
            table[-1] = own
        table.extend(self.take(wanted))
        return True

    def compute(self, work: list[tuple[int, int]]) -> None:
        """One call of the backend for all of them, its output against the reference."""
        starts, lens, slots, tables, parts = [0], [], [], [], []
        for name, new in work:
            q, k, v = self.draw(new, 2), self.draw(new, 1), self.draw(new, 1)
            keys, values = (torch.cat(pair) for pair in zip(self.tokens[name], (k, v), strict=True))
            self.tokens[name] = (keys, values)
            table = self.tables[name]
            slots += [table[p // self.size] * self.size + p % self.size for p in range(len(keys) - new, len(keys))]
            starts.append(starts[-1] + new)
            lens.append(len(keys))
            tables.append(table + [0] * (self.num_blocks - len(table)))
            parts.append((q, k, v))
        where = self.device.torch_device
        query_start, seq_lens = (torch.tensor(x, dtype=torch.int32) for x in (starts, lens))
        batch = AttentionBatch(
            query_start=query_start.to(where),
            seq_lens=seq_lens.to(where),
            block_table=torch.tensor(tables, dtype=torch.int32, device=where),
            slots=torch.tensor(slots, dtype=torch.int64, device=where),
            query_start_host=query_start,
            seq_lens_host=seq_lens,
            num_decodes=sum(new == 1 for _, new in work),
            max_query_len=max(new for _, new in work),
            max_seq_len=max(lens),
            block_size=self.size,
        )
        q, k, v = (torch.cat(x).to(where) for x in zip(*parts, strict=True))
        out = torch.full_like(q, torch.nan)
        self.backend.forward(q, k, v, self.cache, self.backend.plan(batch), out)
        for (name, _), (q, _, _), begin, end in zip(work, parts, starts, starts[1:], strict=False):
            want = attend(self.spec, q, *self.tokens[name], numerics=self.declared.numerics)
            assert excess(out[begin:end], want.out, want.bound) <= 1, f"the output of sequence {name}"

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """A sequence begins as another one is, or as its beginning: a prefix hit of full blocks."""
        name = data.draw(st.sampled_from(sorted(self.tables)))
        keys, values = self.tokens[name]
        length = data.draw(st.sampled_from((len(keys), len(keys) // self.size * self.size)))
        if not length:
            return
        self.count += 1
        table = self.tables[name][: -(-length // self.size)]
        for shared in table:
            self.refs[shared] += 1
        self.tables[self.count] = list(table)
        self.tokens[self.count] = (keys[:length], values[:length])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        """A sequence ends, or is preempted: its blocks go, but for those that others share."""
        self.drop(data.draw(st.sampled_from(sorted(self.tables))))

    def drop(self, name: int) -> None:
        """Give a sequence's blocks up."""
        for held in self.tables.pop(name):
            self.refs[held] -= 1
        del self.tokens[name]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        """A sequence goes to the host, and its blocks to others at once."""
        name = data.draw(st.sampled_from(sorted(self.tables)))
        exported = self.layout.export_blocks(self.cache, self.ids(self.tables[name]))
        self.swapped[name] = tuple(x.cpu() for x in exported), self.tokens[name]
        self.drop(name)

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        """A sequence comes back into whatever blocks are free."""
        name = data.draw(st.sampled_from(sorted(self.swapped)))
        image, tokens = self.swapped[name]
        if len(image[0]) > self.num_free():
            return
        self.tables[name], self.tokens[name] = self.take(len(image[0])), tokens
        del self.swapped[name]
        on_device = (x.to(self.device.torch_device) for x in image)
        self.layout.import_blocks(self.cache, self.ids(self.tables[name]), *on_device)

    @invariant()
    def holds(self) -> None:
        """Every sequence finds its tokens."""
        for name, table in self.tables.items():
            for got, want in zip(
                self.layout.export_blocks(self.cache, self.ids(table)), self.tokens[name], strict=True
            ):
                held = cached(want, self.spec.kv_dtype)
                assert same(got.flatten(0, 1)[: len(want)], held), f"the tokens of sequence {name}"


def test_sequences(conformance_platform: Platform, capabilities: Capabilities, scale: Scale) -> None:
    """Append, fork, copy on write, prefix hit, free, preempt and swap in any order."""
    for dtype in dtypes(capabilities):
        if dtype in capabilities.kv_dtypes:
            run_state_machine_as_test(
                partial(Sequences, conformance_platform, capabilities, dtype),  # type: ignore[arg-type]
                settings=settings(scale.certify(30), stateful_step_count=25),
            )
