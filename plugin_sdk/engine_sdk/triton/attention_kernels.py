"""The kernel of paged attention: one source for decodes, prefills and batches of both.

A program computes one tile of query rows of one key/value head against the keys of its share:

    query rows   | token 0: head 0, head 1, ... | token 1: ... | ... | unused |     BLOCK_M rows, BLOCK_Q tokens
    keys         low ... | share of split 0 | share of split 1 | ... high          BLOCK_N keys an iteration

All query heads of a key/value head lie in one tile, so a key is read once for all of them. Lengths, positions and the
table are read on the device: a launch with the same grid serves any batch within it, so it may be captured.

Where the keys are split, each program leaves its part in a workspace; the last one to arrive merges them, always in
the same order, and sets the counter back to zero for the next layer.

Scores are kept in fp32 and in units of log 2. D is split into D1 + D2, two powers of two, the second perhaps 0, so that
head sizes such as 80, 96 and 576 cost little padding.
"""
# ruff: noqa: N803, N806

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _find_tile(query_start, num_requests, index, LONGER: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The request that owns tile `index`, and the tile's number in it; requests of up to LONGER tokens own none."""
    ROWS: tl.constexpr = 128
    request = 0
    passed = 0
    total = 0
    for begin in range(0, num_requests, ROWS):
        rows = begin + tl.arange(0, ROWS)
        inside = rows < num_requests
        length = tl.load(query_start + rows + 1, mask=inside, other=0) - tl.load(
            query_start + rows, mask=inside, other=0
        )
        tiles = tl.where(length > LONGER, (length + BLOCK_Q - 1) // BLOCK_Q, 0)
        before = inside & (total + tl.cumsum(tiles, 0) <= index)
        request += tl.sum(before.to(tl.int32), 0)
        passed += tl.sum(tl.where(before, tiles, 0), 0)
        total += tl.sum(tiles, 0)
    return request, index - passed


@triton.jit
def _load(pointers, rows, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """A tile; rows outside the mask (where ROWS says that there are such), and columns from WIDTH on, are 0."""
    if ROWS:
        if WIDTH < PADDED:
            tile = tl.load(pointers, mask=rows[:, None] & (columns < WIDTH)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=rows[:, None], other=0.0)
    elif WIDTH < PADDED:
        tile = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _tanh(x):
    """By exponentials, and near zero by its series, where their difference would lose all digits."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15)))
    small = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    tanh = (1 - small) / (1 + small)
    return tl.where(square < 0.01, series, tl.where(x < 0, -tanh, tanh))


@triton.jit
def _attend_keys(
    acc,
    total,
    peak,
    q1,
    q2,
    keys,
    values,
    table,
    positions,
    slopes,
    low,
    begin,
    end,
    k_block,
    k_token,
    v_block,
    v_token,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend keys ``[begin, end)``. Without MASKED, all of them, a multiple of BLOCK_N, are seen by all query rows.

    Where BLOCK_N divides BLOCK_SIZE, `begin` is a multiple of it: each tile lies in one block, the first perhaps partly
    before `low`.

    Returns:
        acc [M, E], total [M] and peak [M] of the softmax so far.
    """
    # Plain scores are scaled within the exponential's multiply-add; others have to be scaled before.
    PLAIN: tl.constexpr = SOFTCAP is None and slopes is None and SCALE > 0
    FACTOR: tl.constexpr = SCALE * LOG2E if PLAIN else 1.0
    d1 = tl.arange(0, D1)
    e = tl.arange(0, E)
    IN_BLOCK: tl.constexpr = BLOCK_SIZE % BLOCK_N == 0
    if IN_BLOCK:  # the next tile's block is looked up while this one is computed
        next_block = tl.load(table + begin // BLOCK_SIZE, mask=begin < end, other=0)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        inside = at < end
        if WINDOW is not None or CHUNK is not None:
            inside &= at >= low
        if IN_BLOCK:
            block = next_block
            following = start + BLOCK_N
            next_block = tl.load(table + following // BLOCK_SIZE, mask=following < end, other=0)
            first = start % BLOCK_SIZE
            rows = tl.arange(0, BLOCK_N)
            keys_at = keys + (block.to(tl.int64) * k_block + first * k_token)
            values_at = values + (block.to(tl.int64) * v_block + first * v_token)
            k_rows = keys_at + (rows * k_token)[:, None]
            v_rows = values_at + (rows * v_token)[:, None]
        else:
            blocks = tl.load(table + at // BLOCK_SIZE, mask=inside if MASKED else None, other=0 if MASKED else None)
            k_rows = keys + (blocks.to(tl.int64) * k_block + at % BLOCK_SIZE * k_token)[:, None]
            v_rows = values + (blocks.to(tl.int64) * v_block + at % BLOCK_SIZE * v_token)[:, None]

        k = _load(k_rows + d1[None, :], inside, d1, MASKED, HEAD_DIM, D1).to(q1.dtype)
        scores = tl.dot(q1, tl.trans(k), input_precision="ieee")
        if D2 > 0:
            d2 = D1 + tl.arange(0, D2)
            k = _load(k_rows + d2[None, :], inside, d2, MASKED, HEAD_DIM, D1 + D2).to(q1.dtype)
            scores = tl.dot(q2, tl.trans(k), scores, input_precision="ieee")

        if SOFTCAP is not None:
            scores = scores * (SCALE / SOFTCAP)
            scores = _tanh(scores) * (SOFTCAP * LOG2E)
        elif not PLAIN:
            scores = scores * (SCALE * LOG2E)
        if slopes is not None:
            scores += (slopes * LOG2E)[:, None] * (at[None, :] - positions[:, None]).to(tl.float32)
        if MASKED:
            seen = inside[None, :]
            if CAUSAL:
                seen &= at[None, :] <= positions[:, None]
            if WINDOW is not None:
                seen &= at[None, :] > positions[:, None] - WINDOW
                if not CAUSAL:
                    seen &= at[None, :] < positions[:, None] + WINDOW
            if CHUNK is not None:
                seen &= at[None, :] >= (positions // CHUNK * CHUNK)[:, None]
            scores = tl.where(seen, scores, float("-inf"))

        higher = tl.maximum(peak, tl.max(scores, 1) * FACTOR)
        pivot = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        p = tl.exp2(scores * FACTOR - pivot[:, None])
        shrink = tl.exp2(peak - pivot)
        total = total * shrink + tl.sum(p, 1)
        peak = higher

        v = _load(v_rows + e[None, :], inside, e, MASKED, V_HEAD_DIM, E).to(q1.dtype)
        acc = tl.dot(p.to(q1.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, peak


@triton.jit
def _locate(rows, head_tile, first, num_queries, GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Of rows of a tile: their tokens within the request, their heads, and whether there are such."""
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    in_request = first + rows // HEADS
    in_group = head_tile % HEAD_TILES * HEADS + rows % HEADS
    alive = (rows < BLOCK_Q * HEADS) & (in_request < num_queries) & (in_group < GROUP)
    return in_request, head_tile // HEAD_TILES * GROUP + in_group, alive


@triton.jit
def _finish(
    acc,
    total,
    peak,
    alive,
    tokens,
    heads,
    columns,
    out,
    lse,
    sinks,
    out_token,
    out_head,
    lse_token,
    lse_head,
    WIDTH: tl.constexpr,
):
    """Add the sinks, divide, and store rows [M, E] and their log-sum-exp [M]."""
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=alive, other=0.0).to(tl.float32) * LOG2E
        pivot = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - pivot)
        total = total * shrink + tl.exp2(sink - pivot)
        acc = acc * shrink[:, None]
        peak = pivot
    total = tl.where(alive, total, 1.0)
    rows = out + tokens.to(tl.int64) * out_token + heads * out_head
    mask = alive[:, None] & (columns < WIDTH)[None, :]
    tl.store(rows[:, None] + columns[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        at = lse + tokens.to(tl.int64) * lse_token + heads * lse_head
        tl.store(at, (peak + tl.log2(total)) * LN2, mask=alive)


@triton.jit
def _merge(
    part, part_lse, active, rows, columns, alive,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, E: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Merge rows of `active` parts, DEPTH at a time; returns acc [M, E], total [M] and peak [M]."""
    acc = tl.zeros([ROWS, E], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for first in range(0, active, DEPTH):
        parts = first + tl.arange(0, DEPTH)
        inside = (parts < active)[:, None] & alive[None, :]
        at = parts[:, None] * BLOCK_M + rows[None, :]
        # Other programs wrote these: past the nearest cache, which need not know.
        lse = tl.load(part_lse + at, mask=inside, other=float("-inf"), cache_modifier=".cg")
        attended = tl.load(
            part + (at * E)[:, :, None] + columns[None, None, :],
            mask=inside[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(peak, tl.max(lse, 0))
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(lse - pivot[None, :])
        shrink = tl.exp2(peak - pivot)
        acc = acc * shrink[:, None] + tl.sum(attended * weights[:, :, None], 0)
        total = total * shrink + tl.sum(weights, 0)
        peak = higher
    return acc, total, peak


@triton.jit
def _finish_merged(
    part, part_lse, active, start, first_token, head_tile, first, num_queries,
    out, lse, sinks, out_token, out_head, lse_token, lse_head,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    E: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Merge the STEP rows of a tile from `start` on, and store them."""
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, E)
    in_request, heads, alive = _locate(rows, head_tile, first, num_queries, GROUP, HEADS, BLOCK_Q)
    alive &= rows < start + STEP
    acc, total, peak = _merge(part, part_lse, active, rows, columns, alive, ROWS, BLOCK_M, E, DEPTH)
    _finish(
        acc, total, peak, alive, first_token + in_request, heads, columns,
        out, lse, sinks, out_token, out_head, lse_token, lse_head, WIDTH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_requests", "least", "table_row"])
def attend(
    q,
    keys,
    values,
    out,
    lse,
    sinks,
    slopes,
    table,
    seq_lens,
    query_start,
    part,
    part_lse,
    arrived,
    num_requests,
    least,
    table_row,
    q_token,
    q_head,
    out_token,
    out_head,
    lse_token,
    lse_head,
    k_block,
    k_token,
    k_head,
    v_block,
    v_token,
    v_head,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LONGER: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_STEP: tl.constexpr,
    MERGE_DEPTH: tl.constexpr,
):
    """Attention of one tile; grid (head tiles, tiles or requests, splits).

    Without LONGER (None), item i of the grid is request i, which is left alone unless it fits in one tile. Else it is
    the i-th tile of the requests that have more than LONGER tokens.

    Args:
        q, out, lse: of the step; `lse`, `sinks` and `slopes` may be None, as in `AttentionBackend.forward`.
        keys, values: of the cache, [num_blocks, B, K, D] in any strides, the last one 1.
        table, seq_lens, query_start: of the step.
        part: float32 [items, head tiles, splits, BLOCK_M, E], where SPLIT; `part_lse` the same without E.
        arrived: int32 [items, head tiles], zero between launches.
        num_requests: R, or the requests to look at.
        least: iterations that a share of the keys has at least.
        table_row and others: strides, in elements.
        SCALE, SOFTCAP, WINDOW, CHUNK, CAUSAL: of the specification.
        GROUP: query heads of a key/value head.
        MERGE_STEP, MERGE_ROWS: rows merged at once, and the next power of two.
        MERGE_DEPTH: parts merged at once, a power of two.
    """
    HEADS: tl.constexpr = GROUP if GROUP < BLOCK_M else BLOCK_M
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    BLOCK_Q: tl.constexpr = BLOCK_M // HEADS

    head_tile = tl.program_id(0)
    item = tl.program_id(1)
    if LONGER is None:
        request = item
        tile = 0
    else:
        request, tile = _find_tile(query_start, num_requests, item, LONGER, BLOCK_Q)
        if request >= num_requests:
            return
    first_token = tl.load(query_start + request)
    num_queries = tl.load(query_start + request + 1) - first_token
    length = tl.load(seq_lens + request)
    if LONGER is None:
        if num_queries > BLOCK_Q:
            return
    else:
        # The last tile sees the most keys: it goes first.
        tile = (num_queries + BLOCK_Q - 1) // BLOCK_Q - 1 - tile
    if num_queries == 0 or length == 0:
        return

    # Query rows, and the keys that the first and the last of them see.
    first = tile * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, num_queries) - 1
    context = length - num_queries
    low = 0
    low_last = 0
    if WINDOW is not None:
        low = tl.maximum(low, context + first - WINDOW + 1)
        low_last = tl.maximum(low_last, context + last - WINDOW + 1)
    if CHUNK is not None:
        low = tl.maximum(low, (context + first) // CHUNK * CHUNK)
        low_last = tl.maximum(low_last, (context + last) // CHUNK * CHUNK)
    if CAUSAL:
        high = context + last + 1
        high_first = context + first + 1
    else:
        high = length
        high_first = length
        if WINDOW is not None:
            high = tl.minimum(high, context + last + WINDOW)
            high_first = tl.minimum(high_first, context + first + WINDOW)

    active = 1
    begin = low
    if BLOCK_SIZE % BLOCK_N == 0:
        begin = low // BLOCK_N * BLOCK_N
    end = high
    if SPLIT:
        iterations = tl.cdiv(high - begin, BLOCK_N)
        share = tl.maximum(tl.cdiv(iterations, tl.num_programs(2)), least)
        active = tl.cdiv(iterations, share)
        if tl.program_id(2) >= active:
            return
        begin += tl.program_id(2) * share * BLOCK_N
        end = tl.minimum(high, begin + share * BLOCK_N)

    rows = tl.arange(0, BLOCK_M)
    in_request, heads, alive = _locate(rows, head_tile, first, num_queries, GROUP, HEADS, BLOCK_Q)
    kv_head = head_tile // HEAD_TILES
    tokens = first_token + in_request
    positions = context + in_request

    d1 = tl.arange(0, D1)
    e = tl.arange(0, E)
    q_rows = (q + tokens.to(tl.int64) * q_token + heads * q_head)[:, None]
    q1 = _load(q_rows + d1[None, :], alive, d1, True, HEAD_DIM, D1)
    q2 = q1
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        q2 = _load(q_rows + d2[None, :], alive, d2, True, HEAD_DIM, D1 + D2)
    row_slopes = None
    if slopes is not None:
        row_slopes = tl.load(slopes + heads, mask=alive, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_M, E], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)

    # A decode has one loop, since the start of another would wait for memory again. Others mask at the ends only.
    ONE_LOOP: tl.constexpr = LONGER is None
    FROM_LOW: tl.constexpr = ONE_LOOP or not (WINDOW is None and CHUNK is None)
    inner_begin = end
    inner_end = end
    if not ONE_LOOP:
        inner_begin = tl.minimum(end, begin + tl.cdiv(tl.maximum(low_last - begin, 0), BLOCK_N) * BLOCK_N)
        inner_end = inner_begin + tl.maximum(tl.minimum(high_first, end) - inner_begin, 0) // BLOCK_N * BLOCK_N
    for phase in tl.static_range(3):
        if FROM_LOW if phase == 0 else not ONE_LOOP:
            acc, total, peak = _attend_keys(
                acc,
                total,
                peak,
                q1,
                q2,
                keys + kv_head * k_head,
                values + kv_head * v_head,
                table + request.to(tl.int64) * table_row,
                positions,
                row_slopes,
                low,
                begin if phase == 0 else (inner_begin if phase == 1 else inner_end),
                inner_begin if phase == 0 else (inner_end if phase == 1 else end),
                k_block,
                k_token,
                v_block,
                v_token,
                phase != 1,
                SCALE,
                SOFTCAP,
                WINDOW,
                CHUNK,
                CAUSAL,
                HEAD_DIM,
                V_HEAD_DIM,
                D1,
                D2,
                E,
                BLOCK_SIZE,
                BLOCK_N,
            )

    if active == 1:
        _finish(
            acc, total, peak, alive, tokens, heads, e,
            out, lse, sinks, out_token, out_head, lse_token, lse_head, V_HEAD_DIM,
        )  # fmt: skip
    elif SPLIT:
        place = item.to(tl.int64) * tl.num_programs(0) + head_tile
        mine = (place * tl.num_programs(2) + tl.program_id(2)) * BLOCK_M + rows
        whole = tl.where(total == 0.0, 1.0, total)
        tl.store(part_lse + mine, peak + tl.log2(whole), mask=alive)
        tl.store(part + (mine * E)[:, None] + e[None, :], acc / whole[:, None], mask=alive[:, None])
        tl.debug_barrier()
        if tl.atomic_add(arrived + place, 1, sem="acq_rel", scope="gpu") == active - 1:
            tl.store(arrived + place, 0)
            base = place * tl.num_programs(2) * BLOCK_M
            for start in range(0, (last - first + 1) * HEADS, MERGE_STEP):
                _finish_merged(
                    part + base * E, part_lse + base, active, start, first_token, head_tile, first, num_queries,
                    out, lse, sinks, out_token, out_head, lse_token, lse_head,
                    V_HEAD_DIM, GROUP, HEADS, BLOCK_Q, BLOCK_M, E, MERGE_STEP, MERGE_ROWS, MERGE_DEPTH,
                )  # fmt: skip
