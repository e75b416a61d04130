"""The kernel of prompts on Hopper, in Gluon: warps with tasks of their own, which plain Triton cannot be told.

A program runs on each multiprocessor, twelve warps, and takes tiles of 128 query rows until there are no more:

    one warp        produces: finds the next tile, and lets the copy engine bring its queries, keys and values
    four warps      consume: attend rows 0 to 63
    four warps      consume: attend rows 64 to 127; both read the same keys and values

    query rows      | token 0: head 0, head 1, ... | token 1: ... |        128 rows, 128 / GROUP tokens
    shared memory   | queries of a tile, of the next | keys or values of 128 tokens | ... |      a ring

A consumer's products are asynchronous. The scores of a tile of keys are begun, then the sum over the values of the tile
before it, and while this sum is under way the softmax of the scores is computed. The other consumer's products fill
what is left. (Shah et al., FlashAttention-3, 2024, https://arxiv.org/abs/2407.08608, does the same in CUDA C++.)

Tiles are handed out by a counter in device memory, those with most keys first, so programs end together; whichever
takes one, its bits are the same. Keys are attended from a tile's last to its first, so what has to be masked comes
first. Scores are kept in fp32 and in units of log 2.
"""
# ruff: noqa: N803, N806

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(128)
"""Query rows of a tile."""
KEYS = gl.constexpr(128)
"""Keys of a tile."""
BOX = gl.constexpr(64)
"""Rows and columns that the copy engine brings at once: 64 of 16 bits are as wide as shared memory is swizzled."""
QUERIES = gl.constexpr(2)
"""Tiles of queries in shared memory."""
BOX_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
"""How a box lies in shared memory; of queries it is [tokens, GROUP, 64], of keys and values [1, 64, 64]."""

_TILE_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_BOX_LAYOUT = gl.constexpr(BOX_LAYOUT)
_LOG2E = gl.constexpr(1.4426950408889634)
_LN2 = gl.constexpr(0.6931471805599453)

# What the producer tells of a tile of queries.
_WORDS = gl.constexpr(8)
_KEY_TILES = gl.constexpr(0)  # 0: there are no more queries
_KV_HEAD = gl.constexpr(1)
_FIRST_TOKEN = gl.constexpr(2)  # of the request, in the step
_NUM_QUERIES = gl.constexpr(3)  # of the request
_CONTEXT = gl.constexpr(4)  # tokens of the request before the step
_FIRST = gl.constexpr(5)  # token of the tile, in the request


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _find_tile(query_start, num_requests, index, LONGER: gl.constexpr, BLOCK_Q: gl.constexpr):
    """The request that owns tile `index`, and the tile's number in it; requests of up to LONGER tokens own none."""
    AT_ONCE: gl.constexpr = 128
    layout: gl.constexpr = gl.BlockedLayout([AT_ONCE // 32], [32], [gl.num_warps()], [0])
    request = 0
    passed = 0
    total = 0
    for begin in range(0, num_requests, AT_ONCE):
        rows = begin + gl.arange(0, AT_ONCE, layout)
        inside = rows < num_requests
        length = gl.load(query_start + rows + 1, mask=inside, other=0) - gl.load(
            query_start + rows, mask=inside, other=0
        )
        tiles = gl.where(length > LONGER, (length + BLOCK_Q - 1) // BLOCK_Q, 0)
        before = inside & (total + gl.associative_scan(tiles, 0, _add) <= index)
        request += gl.sum(before.to(gl.int32), 0)
        passed += gl.sum(gl.where(before, tiles, 0), 0)
        total += gl.sum(tiles, 0)
    return request, index - passed


@gluon.jit
def _tell(words, slot, word: gl.constexpr, value):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    words.index(slot * _WORDS + word).store(gl.full([1], value, gl.int32, one))


@gluon.jit
def _told(words, slot, word: gl.constexpr):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.sum(words.index(slot * _WORDS + word).load(one), 0)


@gluon.jit
def _find_block(table, token, BLOCK_SIZE: gl.constexpr):
    return gl.load(table + token // BLOCK_SIZE), token % BLOCK_SIZE


@gluon.jit
def _bring_tile(
    source, block0, offset0, block1, offset1, column, at, boxes, full, empty, D: gl.constexpr, SLOTS: gl.constexpr
):
    """Bring keys or values of two boxes of tokens into the ring, as its tile `at`."""
    slot = at % SLOTS
    ready = full.index(slot)
    mbarrier.wait(empty.index(slot), ((at // SLOTS) & 1) ^ 1)
    mbarrier.expect(ready, KEYS * D * 2)
    for half in gl.static_range(D // BOX):
        box = (slot * (D // BOX) + half) * 2
        tma.async_copy_global_to_shared(source, [block0, offset0, column + half * BOX], ready, boxes.index(box))
        tma.async_copy_global_to_shared(source, [block1, offset1, column + half * BOX], ready, boxes.index(box + 1))


@gluon.jit
def _produce(
    q, keys, values, table, seq_lens, query_start, counters, num_requests, items, table_row,
    q_boxes, words, q_full, q_empty, boxes, full, empty,
    LONGER: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    """One warp: find tiles of queries, and bring them and what they attend."""
    BLOCK_Q: gl.constexpr = ROWS // GROUP
    Q_BOXES: gl.constexpr = 2 * D // BOX
    taken = 0
    brought = 0
    item = gl.program_id(0)
    while item < items:
        kv_head = item % KV_HEADS
        request, tile = _find_tile(query_start, num_requests, item // KV_HEADS, LONGER, BLOCK_Q)
        if request < num_requests:
            first_token = gl.load(query_start + request)
            num_queries = gl.load(query_start + request + 1) - first_token
            context = gl.load(seq_lens + request) - num_queries
            # The last tile sees the most keys: it goes first.
            first = ((num_queries + BLOCK_Q - 1) // BLOCK_Q - 1 - tile) * BLOCK_Q
            high = context + gl.minimum(first + BLOCK_Q, num_queries)
            key_tiles = (high + KEYS - 1) // KEYS

            slot = taken % QUERIES
            ready = q_full.index(slot)
            mbarrier.wait(q_empty.index(slot), ((taken // QUERIES) & 1) ^ 1)
            _tell(words, slot, _KEY_TILES, key_tiles)
            _tell(words, slot, _KV_HEAD, kv_head)
            _tell(words, slot, _FIRST_TOKEN, first_token)
            _tell(words, slot, _NUM_QUERIES, num_queries)
            _tell(words, slot, _CONTEXT, context)
            _tell(words, slot, _FIRST, first)
            mbarrier.expect(ready, ROWS * D * 2)
            for box in gl.static_range(Q_BOXES):
                token = first_token + first + box // (D // BOX) * (BLOCK_Q // 2)
                at = [token, kv_head * GROUP, box % (D // BOX) * BOX]
                tma.async_copy_global_to_shared(q, at, ready, q_boxes.index(slot * Q_BOXES + box))
            taken += 1

            blocks = table + request.to(gl.int64) * table_row
            last_box = (high - 1) // BOX * BOX
            for i in range(key_tiles):
                start = (key_tiles - 1 - i) * KEYS
                block0, offset0 = _find_block(blocks, start, BLOCK_SIZE)
                # Beyond the last box there may be no block: that box is brought again.
                block1, offset1 = _find_block(blocks, gl.minimum(start + BOX, last_box), BLOCK_SIZE)
                column = kv_head * D
                _bring_tile(keys, block0, offset0, block1, offset1, column, brought, boxes, full, empty, D, SLOTS)
                _bring_tile(values, block0, offset0, block1, offset1, column, brought + 1, boxes, full, empty, D, SLOTS)
                brought += 2
            item = gl.num_programs(0) + gl.atomic_add(counters, 1)
        else:
            item = items
    slot = taken % QUERIES
    mbarrier.wait(q_empty.index(slot), ((taken // QUERIES) & 1) ^ 1)
    _tell(words, slot, _KEY_TILES, 0)
    mbarrier.arrive(q_full.index(slot), count=1)
    # The last program leaves the counters as it found them.
    if gl.atomic_add(counters + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counters, 0)
        gl.store(counters + 1, 0)


@gluon.jit
def _softmax(scores, peak, total, limits, FACTOR: gl.constexpr, MASKED: gl.constexpr, SCORES: gl.constexpr):
    """Probabilities of scores, not yet divided; the new peak and total, and what sums of before shrink by."""
    if MASKED:
        columns = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
        scores = gl.where(columns[None, :] <= limits[:, None], scores, float("-inf"))
    higher = gl.maximum(peak, gl.max(scores, 1) * FACTOR)
    pivot = gl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    p = gl.exp2(scores * FACTOR - pivot[:, None])
    shrink = gl.exp2(peak - pivot)
    return p, higher, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _zero_rows(tile, valid, D: gl.constexpr):
    """Zero values from row `valid` on: what lies there may be NaN, which a probability of zero does not hide.

    Both consumers do so, and write the same.
    """
    STEP: gl.constexpr = 32
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    for part in gl.static_range(KEYS // STEP):
        if valid < (part + 1) * STEP:
            piece = tile.slice(part * STEP, STEP)
            rows = part * STEP + gl.arange(0, STEP, gl.SliceLayout(1, layout))
            held = piece.load(layout)
            piece.store(gl.where((rows < valid)[:, None], held, 0.0).to(held.dtype))
    fence_async_shared()


@gluon.jit
def _shrunk(acc, shrink, SUMS: gl.constexpr):
    return acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]


@gluon.jit
def _attend_tile(
    q, ring, full, empty, at, acc, p, peak, total, limits,
    FACTOR: gl.constexpr, MASKED: gl.constexpr, SLOTS: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Attend the keys of the ring's tile `at`, and add the values of those before, whose probabilities are `p`."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    p16 = gl.convert_layout(p.to(q.dtype), OPERAND)
    k_slot = at % SLOTS
    mbarrier.wait(full.index(k_slot), (at // SLOTS) & 1)
    unused = gl.zeros([ROWS // 2, KEYS], gl.float32, SCORES)
    scores = warpgroup_mma(q, ring.index(k_slot).permute((1, 0)), unused, use_acc=False, is_async=True)
    v_slot = (at - 1) % SLOTS
    acc = warpgroup_mma(p16, ring.index(v_slot), acc, is_async=True)
    scores = warpgroup_mma_wait(1, (scores,))
    mbarrier.arrive(empty.index(k_slot), count=1)
    p, peak, total, shrink = _softmax(scores, peak, total, limits, FACTOR, MASKED, SCORES)
    # This tile's values are needed next. To wait for them here keeps the assembler from moving the other wait, for the
    # sum, before the softmax.
    mbarrier.wait(full.index((at + 1) % SLOTS), ((at + 1) // SLOTS) & 1)
    acc = warpgroup_mma_wait(0, (acc,))
    mbarrier.arrive(empty.index(v_slot), count=1)
    return _shrunk(acc, shrink, SUMS), p, peak, total


@gluon.jit
def _consume(
    out, lse, out_token, out_head, lse_token, lse_head,
    queries, words, q_full, q_empty, ring, full, empty,
    HALF: gl.constexpr, SCALE: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Four warps: attend one half of each tile's rows."""
    BLOCK_Q: gl.constexpr = ROWS // GROUP
    FACTOR: gl.constexpr = SCALE * _LOG2E
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    rows = gl.arange(0, ROWS // 2, gl.SliceLayout(1, SCORES))
    taken = 0
    at = 0
    mbarrier.wait(q_full.index(0), 0)
    key_tiles = _told(words, 0, _KEY_TILES)
    while key_tiles > 0:
        slot = taken % QUERIES
        q = queries.index(slot * 2 + HALF)
        kv_head = _told(words, slot, _KV_HEAD)
        first_token = _told(words, slot, _FIRST_TOKEN)
        num_queries = _told(words, slot, _NUM_QUERIES)
        context = _told(words, slot, _CONTEXT)
        first = _told(words, slot, _FIRST) + HALF * (BLOCK_Q // 2)
        taken += 1
        # All rows see the tiles before the one that the first row's position lies in; the last one is always masked.
        masked = gl.maximum(key_tiles - (context + first + 1) // KEYS, 1)
        limits = context + first + rows // GROUP - (key_tiles - 1) * KEYS

        k_slot = at % SLOTS
        mbarrier.wait(full.index(k_slot), (at // SLOTS) & 1)
        unused = gl.zeros([ROWS // 2, KEYS], gl.float32, SCORES)
        scores = warpgroup_mma(q, ring.index(k_slot).permute((1, 0)), unused, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, (scores,))
        mbarrier.arrive(empty.index(k_slot), count=1)
        peak = gl.full([ROWS // 2], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([ROWS // 2], gl.float32, gl.SliceLayout(1, SCORES))
        p, peak, total, _ = _softmax(scores, peak, total, limits, FACTOR, True, SCORES)
        acc = gl.zeros([ROWS // 2, D], gl.float32, SUMS)
        v_slot = (at + 1) % SLOTS
        mbarrier.wait(full.index(v_slot), ((at + 1) // SLOTS) & 1)
        valid = context + num_queries - (key_tiles - 1) * KEYS
        if valid < KEYS:
            _zero_rows(ring.index(v_slot), valid, D)
        for _ in range(1, masked):
            at += 2
            limits += KEYS
            acc, p, peak, total = _attend_tile(
                q, ring, full, empty, at, acc, p, peak, total, limits, FACTOR, True, SLOTS, SCORES, SUMS
            )
        for _ in range(masked, key_tiles):
            at += 2
            acc, p, peak, total = _attend_tile(
                q, ring, full, empty, at, acc, p, peak, total, limits, FACTOR, False, SLOTS, SCORES, SUMS
            )
        mbarrier.arrive(q_empty.index(slot), count=1)
        v_slot = (at + 1) % SLOTS
        acc = warpgroup_mma(
            gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, SUMS, 2)), ring.index(v_slot), acc, is_async=True
        )
        at += 2
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index(v_slot), count=1)

        in_request = first + gl.arange(0, ROWS // 2, gl.SliceLayout(1, SUMS)) // GROUP
        heads = kv_head * GROUP + gl.arange(0, ROWS // 2, gl.SliceLayout(1, SUMS)) % GROUP
        columns = gl.arange(0, D, gl.SliceLayout(0, SUMS))
        places = out + (first_token + in_request).to(gl.int64) * out_token + heads * out_head
        attended = _shrunk(acc, 1.0 / total, SUMS).to(out.dtype.element_ty)
        gl.store(places[:, None] + columns[None, :], attended, mask=(in_request < num_queries)[:, None])
        if lse is not None:
            in_request = first + rows // GROUP
            heads = kv_head * GROUP + rows % GROUP
            places = lse + (first_token + in_request).to(gl.int64) * lse_token + heads * lse_head
            gl.store(places, (peak + gl.log2(total)) * _LN2, mask=in_request < num_queries)
        mbarrier.wait(q_full.index(taken % QUERIES), (taken // QUERIES) & 1)
        key_tiles = _told(words, taken % QUERIES, _KEY_TILES)


@gluon.jit
def _barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit(do_not_specialize=["num_requests", "items", "table_row"])
def attend_prompts(
    q, keys, values, out, lse, table, seq_lens, query_start, counters, num_requests, items, table_row,
    out_token, out_head, lse_token, lse_head,
    SCALE: gl.constexpr, LONGER: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Causal attention of requests of more than LONGER tokens; grid (programs,), at most one a multiprocessor.

    Takes four warps, and 168 registers of a lane at most: of 12 warps all that there are, which consumers and producer
    then share out as they need them.

    Args:
        q: describes [N, H, D] in boxes of [64 / GROUP, GROUP, 64].
        keys, values: describe [num_blocks, B, K * D] in boxes of [1, 64, 64].
        out: [N, H, D], the last dimension dense; `lse`, float32 [N, H], may be None.
        table, seq_lens, query_start: of the step.
        counters: int32 [2], zero between launches.
        num_requests: R.
        items: tiles of ROWS query rows, or more, times KV_HEADS.
        table_row and others: strides, in elements.
        SCALE: of the specification, more than 0.
        GROUP: query heads of a key/value head, which divides 64.
        BLOCK_SIZE: B, a multiple of 64.
        SLOTS: tiles of keys or values in shared memory.
    """
    dtype: gl.constexpr = out.dtype.element_ty
    queries = gl.allocate_shared_memory(dtype, [QUERIES * 2, ROWS // 2, D], _TILE_LAYOUT)
    ring = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, D], _TILE_LAYOUT)
    # The same memory, in boxes: each has 64 columns of 64 rows.
    q_boxes = queries._reinterpret(dtype, [QUERIES * 2 * D // BOX, BOX // GROUP, GROUP, BOX], _BOX_LAYOUT)
    boxes = ring._reinterpret(dtype, [SLOTS * 2 * D // BOX, 1, BOX, BOX], _BOX_LAYOUT)
    words = gl.allocate_shared_memory(gl.int32, [QUERIES * _WORDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = _barriers(QUERIES, 1)
    q_empty = _barriers(QUERIES, 2)
    full = _barriers(SLOTS, 1)
    empty = _barriers(SLOTS, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    out, lse, out_token, out_head, lse_token, lse_head,
                    queries, words, q_full, q_empty, ring, full, empty, 0, SCALE, GROUP, D, SLOTS,
                ),
            ),
            (
                _consume,
                (
                    out, lse, out_token, out_head, lse_token, lse_head,
                    queries, words, q_full, q_empty, ring, full, empty, 1, SCALE, GROUP, D, SLOTS,
                ),
            ),
            (
                _produce,
                (
                    q, keys, values, table, seq_lens, query_start, counters, num_requests, items, table_row,
                    q_boxes, words, q_full, q_empty, boxes, full, empty,
                    LONGER, GROUP, D, KV_HEADS, BLOCK_SIZE, SLOTS,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
