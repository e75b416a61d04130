"""Specifications, pages and the prefix cache, against what they mean by definition."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import CacheConfig
from engine.kv.allocator import BlockAllocator
from engine.kv.manager import BlockTable, KVCacheManager
from engine.kv.spec import ChunkedSpec, FullSpec, KVCacheSpec, KVGroup, SlidingWindowSpec
from engine_conformance.kv_invariants import check_allocator, check_manager

SPECS = st.one_of(
    st.builds(FullSpec, st.integers(1, 4)),
    st.builds(SlidingWindowSpec, st.integers(1, 4), st.integers(1, 12)),
    st.builds(ChunkedSpec, st.integers(1, 4), st.integers(1, 12)),
)


def sees(spec: KVCacheSpec, query: int, key: int) -> bool:
    match spec:
        case SlidingWindowSpec(window=window):
            return query - window < key <= query
        case ChunkedSpec(chunk=chunk):
            return key // chunk == query // chunk and key <= query
    return key <= query


def needed_blocks(spec: KVCacheSpec, num_computed: int, horizon: int = 40) -> set[int]:
    """Blocks of computed tokens that some later query sees."""
    queries = range(num_computed, num_computed + horizon)
    return {key // spec.block_size for key in range(num_computed) if any(sees(spec, query, key) for query in queries)}


@given(SPECS, st.integers(0, 40))
def test_dead_blocks_are_those_that_no_later_token_sees(spec: KVCacheSpec, num_computed: int) -> None:
    dead = spec.num_dead(num_computed)
    needed = needed_blocks(spec, num_computed)
    assert all(block >= dead for block in needed)
    # a block that is not dead is seen, or still has room, or comes after one that is seen
    assert dead == min(needed, default=num_computed // spec.block_size)


@given(SPECS, st.integers(1, 40), st.integers(1, 12), st.data())
def test_max_blocks_bounds_what_is_held(spec: KVCacheSpec, num_tokens: int, step: int, data: st.DataObject) -> None:
    computed, held = 0, 0
    while computed < num_tokens:
        end = min(num_tokens, computed + data.draw(st.integers(1, step)))
        held = max(held, spec.num_blocks(end) - spec.num_dead(computed))
        computed = end
    bound = spec.max_blocks(num_tokens, step)
    assert held <= bound <= spec.num_blocks(num_tokens)
    assert bound <= spec.max_blocks(num_tokens + 1, step)
    assert bound <= spec.max_blocks(num_tokens, step + 1)


@given(SPECS, st.lists(st.booleans(), min_size=40, max_size=40), st.integers(0, 40), st.integers(1, 3))
def test_longest_hit(spec: KVCacheSpec, cached: list[bool], limit: int, times: int) -> None:
    align = spec.block_size * times
    hits = [n for n in range(0, limit + 1, align) if all(cached[i] for i in needed_blocks(spec, n))]
    assert spec.longest_hit(lambda i: int(cached[i]), limit, align) == hits[-1]


def test_full_hit_stops_at_the_first_miss() -> None:
    pages = {0: 5, 1: 6}
    assert FullSpec(4).longest_hit(lambda i: pages.pop(i, 0), 4000, 4) == 8
    assert not pages, "each block is asked for once"


# -- pages


def test_pages_are_handed_out_once_and_never_the_null_page() -> None:
    allocator = BlockAllocator(5)
    blocks = allocator.allocate(4)
    assert sorted(blocks) == [1, 2, 3, 4]
    assert allocator.num_free == 0
    allocator.release(blocks)
    check_allocator(allocator, [])
    with pytest.raises(AssertionError, match="twice"):
        allocator.release(blocks[:1])


def test_blank_pages_go_first_then_those_idle_longest() -> None:
    allocator = BlockAllocator(6)
    a, b, c, blank = allocator.allocate(4)
    for block, key in ((a, b"a"), (b, b"b"), (c, b"c")):
        allocator.publish(block, (key, 0))
    allocator.release([b, a, c, blank])
    allocator.acquire([b])  # a hit makes it recent
    allocator.release([b])
    assert set(allocator.allocate(2)) == {blank, 5}
    assert [allocator.lookup((key, 0)) for key in (b"a", b"b", b"c")] == [a, b, c]
    assert allocator.allocate(1) == [a]
    assert allocator.lookup((b"a", 0)) is None
    assert allocator.allocate(2) == [c, b]
    check_allocator(allocator, [1, 2, 3, 4, 5])


def test_a_page_is_known_for_its_group_only_and_the_first_copy_stays() -> None:
    allocator = BlockAllocator(4)
    first, second = allocator.allocate(2)
    allocator.publish(first, (b"x", 0))
    allocator.publish(second, (b"x", 0))
    assert allocator.lookup((b"x", 0)) == first
    assert allocator.lookup((b"x", 1)) is None
    allocator.release([first, second])
    check_allocator(allocator, [])


@settings(max_examples=50)
@given(st.data())
def test_allocator_against_a_model(data: st.DataObject) -> None:
    allocator = BlockAllocator(data.draw(st.integers(1, 8)))
    held: list[int] = []
    for number in range(30):
        match data.draw(st.sampled_from(["allocate", "release", "publish", "hit"])):
            case "allocate":
                held += allocator.allocate(data.draw(st.integers(0, allocator.num_free)))
            case "release" if held:
                allocator.release([held.pop(data.draw(st.integers(0, len(held) - 1)))])
            case "publish" if held:
                block = data.draw(st.sampled_from(held))
                if all(allocator.lookup((bytes([n]), 0)) != block for n in range(number)):
                    allocator.publish(block, (bytes([number]), 0))
            case "hit":
                block = allocator.lookup((bytes([data.draw(st.integers(0, 30))]), 0)) or 0
                if block:
                    assert allocator.num_idle([block]) == (block not in held)
                    allocator.acquire([block])
                    held.append(block)
        check_allocator(allocator, held)


# -- tables and the prefix cache


def manager(*specs: KVCacheSpec, num_blocks: int = 100, caching: bool = True) -> KVCacheManager:
    return KVCacheManager([KVGroup(spec, ()) for spec in specs], CacheConfig(num_blocks, caching))


def compute(kv: KVCacheManager, token_ids: list[int], chunk: int = 1000, salt: str | None = None) -> BlockTable:
    """A sequence whose tokens are all computed, `chunk` at a time, the cache left aside."""
    table = kv.open(token_ids, salt)
    for start in range(0, len(token_ids), chunk):
        assert kv.reserve(table, start, min(start + chunk, len(token_ids))) is not None
    return table


def hit(kv: KVCacheManager, token_ids: list[int], salt: str | None = None) -> int:
    return kv.match(kv.open(token_ids, salt), len(token_ids) - 1).num_tokens


PROMPT = list(range(100, 120))


@pytest.mark.parametrize("live", [True, False])
def test_prefix_hits(live: bool) -> None:
    kv = manager(FullSpec(4))
    table = compute(kv, PROMPT[:14])
    if not live:
        kv.release(table, 14)
    assert hit(kv, PROMPT) == 12
    assert hit(kv, PROMPT[:13]) == 12
    assert hit(kv, PROMPT[:12]) == 8, "one token is always computed"
    assert hit(kv, PROMPT[:4]) == 0
    assert hit(kv, [*PROMPT[:7], 0, *PROMPT[8:]]) == 4
    assert hit(kv, [0, *PROMPT[1:]]) == 0, "the hash is chained"


def test_salt_separates() -> None:
    kv = manager(FullSpec(4))
    compute(kv, PROMPT, salt="a")
    assert [hit(kv, PROMPT, salt) for salt in ("a", "b", None, "")] == [16, 0, 0, 0]


def test_no_hits_without_caching_or_without_groups() -> None:
    kv = manager(FullSpec(4), caching=False)
    table = compute(kv, PROMPT)
    kv.release(table, len(PROMPT))
    assert hit(kv, PROMPT) == 0
    kv = manager(num_blocks=1)
    table = kv.open(PROMPT)
    assert kv.admit(table, kv.match(table, 19), 20, 5)
    assert kv.reserve(table, 20, 21) == []


def test_groups_agree_on_a_hit() -> None:
    """Two block sizes: the hit is a multiple of both; a window needs its last blocks only."""
    kv = manager(SlidingWindowSpec(2, 5), FullSpec(4))
    table = compute(kv, PROMPT)
    prefix = kv.match(kv.open(PROMPT), 19)
    assert prefix.num_tokens == 16
    assert prefix.blocks[0] == [0] * 6 + table.blocks[0][6:8]
    assert prefix.blocks[1] == table.blocks[1][:4]


def test_a_shorter_hit_of_one_group_is_checked_by_the_others() -> None:
    kv = manager(FullSpec(2), SlidingWindowSpec(2, 3), num_blocks=40)
    table = compute(kv, PROMPT)
    # of the window's blocks only 1, 2, 3 and 8 stay cached: a hit at t needs block t / 2 - 1
    for i, block in enumerate(table.blocks[1]):
        if block and i not in (1, 2, 3, 8):
            kv.allocator._forget(block)
    assert hit(kv, PROMPT) == 18
    kv.allocator._forget(table.blocks[0][8])
    assert hit(kv, PROMPT) == 8
    kv.allocator._forget(table.blocks[0][1])
    assert hit(kv, PROMPT) == 0


def test_windows_agree_on_a_hit_that_none_of_them_proposed() -> None:
    kv = manager(SlidingWindowSpec(2, 3), SlidingWindowSpec(2, 3))
    table = kv.open(PROMPT)
    for group, ends in enumerate(((4, 12, 16), (4, 8, 14))):  # where a window's worth is cached
        for end in ends:
            (block,) = kv.allocator.allocate(1)
            kv.allocator.publish(block, (kv._hash(table, 2, end // 2 - 1), group))
    assert hit(kv, PROMPT) == 4


def test_reserve_is_for_all_groups_or_none() -> None:
    kv = manager(FullSpec(4), SlidingWindowSpec(4, 8), num_blocks=8)
    table = kv.open(PROMPT)
    assert kv.reserve(table, 0, 12) == table.blocks
    before = [list(blocks) for blocks in table.blocks]
    assert kv.reserve(table, 12, 20) is None
    assert kv.reserve(table, 12, 12) == [[], []]
    # the window of token 12 begins at 5, in block 1: block 0 is given up even so
    before[1][0] = 0
    assert table.blocks == before
    assert [len(new) for new in kv.reserve(table, 12, 16) or ()] == [1, 1]
    check_manager(kv, [table])


def test_blocks_that_fell_out_of_the_window_are_given_up_at_once() -> None:
    kv = manager(SlidingWindowSpec(4, 8), num_blocks=12)
    table = compute(kv, PROMPT[:18])
    assert kv.usage() == pytest.approx(5 / 11)
    table.token_ids.append(0)
    kv.reserve(table, 18, 19)  # has room in block 4, and sees tokens from 11 on
    assert table.blocks[0][:3].count(0) == 2
    assert kv.usage() == pytest.approx(3 / 11)
    kv.release(table, 19)
    assert kv.usage() == 0
    assert hit(kv, PROMPT[:17]) == 16


def test_chunked_attention_needs_nothing_at_a_chunk_boundary() -> None:
    kv = manager(ChunkedSpec(4, 8))
    table = compute(kv, PROMPT, chunk=8)
    assert table.blocks[0][:4] == [0] * 4
    prefix = kv.match(kv.open(PROMPT), 18)
    assert (prefix.num_tokens, prefix.blocks) == (16, [[0] * 4])
    assert kv.match(kv.open(PROMPT), 15).blocks[0][:2] == [0, 0]


def test_only_known_tokens_are_cached() -> None:
    """With a token in flight, a full block can be hit once the token has arrived."""
    kv = manager(FullSpec(4))
    token_ids = PROMPT[:7]
    table = compute(kv, token_ids)
    kv.reserve(table, 7, 8)
    kv.reserve(table, 8, 9)
    assert hit(kv, PROMPT) == 4
    token_ids.append(PROMPT[7])
    kv.release(table, 9)
    assert hit(kv, PROMPT) == 8


def test_the_end_of_a_prompt_is_evicted_first() -> None:
    kv = manager(FullSpec(4), SlidingWindowSpec(4, 100), num_blocks=11)
    kv.release(compute(kv, PROMPT), 20)
    other = kv.open([0])
    for evicted, left in ((1, 16), (2, 16), (3, 12), (4, 12), (5, 8)):
        other.blocks[0] += kv.allocator.allocate(1)
        assert hit(kv, [*PROMPT, 0]) == left, evicted


def test_admission_counts_shared_blocks_once_and_leaves_room() -> None:
    kv = manager(FullSpec(4), num_blocks=9)
    first = compute(kv, PROMPT)  # 5 pages of 8
    second = kv.open(list(PROMPT))
    prefix = kv.match(second, 19)
    assert not kv.admit(second, prefix, 20, num_running=3)
    assert second.blocks == [[]]
    assert kv.admit(second, prefix, 20, num_running=2)
    assert second.blocks[0][:4] == first.blocks[0][:4]
    assert (kv.num_queried, kv.num_hit) == (20, 16)
    check_manager(kv, [first, second])
    kv.release(first, 20)
    kv.release(second, 20)
    third = kv.open([*PROMPT[:8], *range(24)])  # 8 pages, two of them idle ones
    assert not kv.admit(third, kv.match(third, 31), 32, num_running=1)
    assert kv.admit(third, kv.match(third, 31), 32, num_running=0)
    check_manager(kv, [third])


def test_reset_of_the_prefix_cache() -> None:
    kv = manager(FullSpec(4))
    table = compute(kv, PROMPT)
    assert not kv.reset_prefix_cache()
    kv.release(table, 20)
    assert hit(kv, PROMPT) == 16
    assert kv.reset_prefix_cache()
    assert hit(kv, PROMPT) == 0
    check_manager(kv, [])


def test_a_hash_depends_on_every_token_before_its_end() -> None:
    kv = manager(FullSpec(2), FullSpec(3))

    def last(token_ids: list[int], block_size: int = 3) -> bytes:
        return kv._hash(kv.open(token_ids), block_size, 18 // block_size - 1)

    variants = [[*PROMPT[:i], PROMPT[i] + 1, *PROMPT[i + 1 :]] for i in range(18)]
    assert len({last(ids) for ids in (PROMPT, *variants)}) == 19
    assert last(PROMPT) == last(PROMPT[:18]) != last(PROMPT, 2)
