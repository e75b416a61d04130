"""Drawing tokens in Triton, exactly those of `engine_sdk.sampling`: two launches, or one where all rows are greedy.

The first kernel finds the best token of each row, and the best logit of each block of tokens on the way. The second one
draws, in one of two ways:

    no top_k, no top_p     all programs of a row add up the weights of its blocks, the last to arrive draws
    others                 one program: the top_k likeliest are in blocks whose best is among the top_k best of blocks,
                           so the rest of the row is not read again

Counters of arrivals go back to zero, so that nothing is cleared between steps.
"""
# ruff: noqa: N803, N806

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.interfaces import DrawInputs
from engine_sdk.sampling import HALVING
from engine_sdk.triton.tuning import DeviceProperties, device_properties

_BLOCK = 128  # tokens whose weights are added up before one of them is looked for
_LISTED = 8192  # likely tokens that are listed; where there are more, the whole row is searched
_PROGRAMS_PER_CORE = 4
_LEAST = 2048  # tokens that are worth a program

C1 = tl.constexpr(HALVING[0])
C2 = tl.constexpr(HALVING[1])
C3 = tl.constexpr(HALVING[2])
C4 = tl.constexpr(HALVING[3])
C5 = tl.constexpr(HALVING[4])
LEVELS = tl.constexpr(DrawInputs.LEVELS)
LAST = tl.constexpr(DrawInputs.LAST)
ONE = tl.constexpr(DrawInputs.ONE)
LOWEST = tl.constexpr(-(1 << 31))
HIGHEST = tl.constexpr((1 << 31) - 1)


@triton.jit
def _order(x):
    """Integers in the order of fp32 numbers; NaN above all, both zeros alike."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, HIGHEST, tl.where(bits < 0, bits ^ HIGHEST, bits))


@triton.jit
def _level(x, best, scale):
    # A difference and then a product: nothing that could be one rounding instead of two.
    return tl.minimum((best - x) * scale, LAST * 1.0).to(tl.int32)


@triton.jit
def _weigh(level):
    """`engine_sdk.sampling.weigh`."""
    f = (level & (LEVELS - 1)).to(tl.int64)
    made = C4 - (f * C5 >> 16)
    made = C3 - (made * f >> 16)
    made = C2 - (made * f >> 16)
    made = C1 - (made * f >> 16)
    made = ((1 << 31) - (made * f >> 16) + (1 << 6)) >> 7
    weight = (made << 16) >> (level >> 16).to(tl.int64)
    return tl.where(level < LAST, weight, 0)


@triton.jit
def _share(total, fraction):
    """``total * fraction / ONE`` rounded down, for total < 2**62."""
    return (total >> 31) * fraction + ((total & (ONE - 1)) * fraction >> 31)


@triton.jit
def _best(logits, row_stride, maxima, arrived, token_ids, V, NUM_BLOCKS, per_program,
          BLOCK: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr):  # fmt: skip
    """The best token of each row, and the best of each block, as `_order` has them; grid (S, programs)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    maxima += row * NUM_BLOCKS
    within = tl.arange(0, BLOCK)[None, :]
    first = tl.program_id(1) * per_program
    last = tl.minimum(first + per_program, NUM_BLOCKS)
    for begin in range(first, last, ROWS):
        blocks = begin + tl.arange(0, ROWS)
        at = blocks[:, None] * BLOCK + within
        inside = (blocks < last)[:, None] & (at < V)
        x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
        tl.store(maxima + blocks, tl.max(_order(x), 1), mask=blocks < last)
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
        tl.store(arrived + row, 0)
        blocks = tl.arange(0, ALL)
        keys = tl.load(maxima + blocks, mask=blocks < NUM_BLOCKS, other=LOWEST, cache_modifier=".cg")
        best = tl.max(keys, 0)
        block = tl.min(tl.where(keys == best, blocks, ALL), 0)
        at = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
        same = (_order(x) == best) & (at < V)
        tl.store(token_ids + row, tl.min(tl.where(same, at, V), 0).to(tl.int64))


@triton.jit
def _tile(logits, listed, is_listed, count, begin, TILE: tl.constexpr):
    """Ids and logits of TILE tokens of those that are searched: of the list, or the row. Beyond, HIGHEST and -inf."""
    at = begin + tl.arange(0, TILE)
    inside = at < count
    ids = tl.where(inside, at, HIGHEST)
    if is_listed:
        ids = tl.load(listed + at, mask=inside, other=HIGHEST)
    return ids, tl.load(logits + ids, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _kept_weight(x, best, scale, cut, kth):
    """Weights of tokens whose level is at most `cut`, and order at least `kth`; 0 for others."""
    level = _level(x, best, scale)
    return _weigh(tl.where((level <= cut) & (_order(x) >= kth), level, LAST))


@triton.jit
def _weigh_all(logits, listed, is_listed, count, x, best, scale, cut, kth, TILE: tl.constexpr):
    """What all tokens that are kept weigh together; `x` is the first tile."""
    weight = _kept_weight(x, best, scale, cut, kth)
    for begin in range(TILE, count, TILE):
        _, more = _tile(logits, listed, is_listed, count, begin, TILE)
        weight += _kept_weight(more, best, scale, cut, kth)
    return tl.sum(weight, 0)


@triton.jit
def _list_likely(logits, maxima, listed, top_k, V, NUM_BLOCKS,
                 BLOCK: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr, LISTED: tl.constexpr):  # fmt: skip
    """List, in the order of ids, some tokens that the `top_k` likeliest are among.

    Returns:
        How many are listed, or would be if there was room; a bound in their order, that `top_k` tokens reach.
    """
    TILE: tl.constexpr = BLOCK * ROWS
    blocks = tl.arange(0, ALL)
    real = blocks < NUM_BLOCKS
    keys = tl.load(maxima + blocks, mask=real, other=LOWEST)
    bound = LOWEST
    if top_k <= NUM_BLOCKS:
        # The top_k-th largest of the blocks' best.
        bound = _kth_of(keys, top_k, tl.min(tl.where(real, keys, HIGHEST), 0), tl.max(keys, 0))
    chosen = (keys >= bound) & real
    number = tl.cumsum(chosen.to(tl.int32), 0)
    tl.store(listed + LISTED + number - 1, blocks, mask=chosen)
    tl.debug_barrier()
    num_chosen = tl.max(number, 0)
    found = 0
    for begin in range(0, num_chosen, ROWS):
        mine = begin + tl.arange(0, TILE) // BLOCK
        block = tl.load(listed + LISTED + mine, mask=mine < num_chosen, other=0)
        at = block * BLOCK + tl.arange(0, TILE) % BLOCK
        inside = (mine < num_chosen) & (at < V)
        x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
        likely = inside & (_order(x) >= bound)
        to = found + tl.cumsum(likely.to(tl.int32), 0)
        tl.store(listed + to - 1, at, mask=likely & (to <= LISTED))
        found = tl.max(to, 0)
    tl.debug_barrier()
    return found, bound


@triton.jit
def _kth_of(keys, k, low, high):
    """The k-th largest of keys [N], which lies in ``[low, high]``, by bisection."""
    low = low.to(tl.int64)
    high = high.to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        enough = tl.sum((keys >= middle).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.int32)


@triton.jit
def _draw_filtered(
    logits, maxima, listed, best, scale, cut, top_k, top_p, u, V, NUM_BLOCKS,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """One row with a top_k or a top_p, by one program."""
    TILE: tl.constexpr = BLOCK * ROWS
    count = V
    is_listed = False
    kth = LOWEST
    if top_k < V:
        found, kth = _list_likely(logits, maxima, listed, top_k, V, NUM_BLOCKS, BLOCK, ROWS, ALL, LISTED)
        if found <= LISTED:
            count = found
            is_listed = True
    # The first tile, mostly the only one, stays in registers.
    ids, x = _tile(logits, listed, is_listed, count, 0, TILE)
    if top_k < V:
        high = _order(best)
        if count <= TILE:
            kth = _kth_of(_order(x), top_k, kth, high)
        else:
            low = kth.to(tl.int64)
            end = high.to(tl.int64) + 1
            while end - low > 1:
                middle = (low + end) >> 1
                above = (_order(x) >= middle).to(tl.int32)
                for begin in range(TILE, count, TILE):
                    _, more = _tile(logits, listed, is_listed, count, begin, TILE)
                    above += (_order(more) >= middle).to(tl.int32)
                enough = tl.sum(above, 0) >= top_k
                low = tl.where(enough, middle, low)
                end = tl.where(enough, end, middle)
            kth = low.to(tl.int32)

    total = _weigh_all(logits, listed, is_listed, count, x, best, scale, cut, kth, TILE)
    if top_p < ONE:
        need = tl.maximum(_share(total, top_p), 1)
        low = tl.zeros([], tl.int64) - 1
        cut = tl.minimum(cut, LAST - 1)  # up to here there is enough
        while cut - low > 1:
            middle = (low + cut) >> 1
            mass = _weigh_all(logits, listed, is_listed, count, x, best, scale, middle, kth, TILE)
            low = tl.where(mass >= need, low, middle)
            cut = tl.where(mass >= need, middle, cut)
        total = _weigh_all(logits, listed, is_listed, count, x, best, scale, cut, kth, TILE)

    target = _share(total, u)
    weight = _kept_weight(x, best, scale, cut, kth)
    passed = tl.sum(weight, 0)
    token = tl.min(tl.where(tl.cumsum(weight, 0) > target, ids, HIGHEST), 0)
    for begin in range(TILE, count, TILE):
        if passed <= target:
            ids, x = _tile(logits, listed, is_listed, count, begin, TILE)
            weight = _kept_weight(x, best, scale, cut, kth)
            token = tl.min(tl.where(passed + tl.cumsum(weight, 0) > target, ids, HIGHEST), 0)
            passed += tl.sum(weight, 0)
    return token


@triton.jit
def _draw(
    logits, row_stride, maxima, masses, listed, arrived, token_ids, top_ks, top_ps, cuts, us, scales,
    V, NUM_BLOCKS, per_program,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr, LISTED: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """Draw where `_best` found the best token; grid (S, programs)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    top_k = tl.load(top_ks + row)
    if top_k == 1:
        return
    best = tl.load(logits + tl.load(token_ids + row)).to(tl.float32)
    if (best != best) | (tl.abs(best) == float("inf")):
        return
    top_p = tl.load(top_ps + row)
    cut = tl.load(cuts + row)
    u = tl.load(us + row)
    scale = tl.load(scales + row)
    if FILTERED:  # noqa: SIM102  (a constant, unlike what follows)
        if (top_k < V) | (top_p < ONE):
            if tl.program_id(1) == 0:
                token = _draw_filtered(
                    logits, maxima + row * NUM_BLOCKS, listed + row * (LISTED + NUM_BLOCKS), best, scale, cut,
                    top_k, top_p, u, V, NUM_BLOCKS, BLOCK, ROWS, ALL, LISTED,
                )  # fmt: skip
                tl.store(token_ids + row, token.to(tl.int64))
            return

    masses += row * NUM_BLOCKS
    within = tl.arange(0, BLOCK)[None, :]
    first = tl.program_id(1) * per_program
    last = tl.minimum(first + per_program, NUM_BLOCKS)
    for begin in range(first, last, ROWS):
        blocks = begin + tl.arange(0, ROWS)
        at = blocks[:, None] * BLOCK + within
        inside = (blocks < last)[:, None] & (at < V)
        x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
        level = _level(x, best, scale)
        weight = _weigh(tl.where(level <= cut, level, LAST))
        tl.store(masses + blocks, tl.sum(weight, 1), mask=blocks < last)
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
        tl.store(arrived + row, 0)
        blocks = tl.arange(0, ALL)
        mass = tl.load(masses + blocks, mask=blocks < NUM_BLOCKS, other=0, cache_modifier=".cg")
        target = _share(tl.sum(mass, 0), u)
        up_to = tl.cumsum(mass, 0)
        block = tl.min(tl.where(up_to > target, blocks, ALL), 0)
        target -= tl.sum(tl.where(blocks < block, mass, 0), 0)
        at = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
        level = _level(x, best, scale)
        weight = _weigh(tl.where(level <= cut, level, LAST))
        beyond = tl.cumsum(weight, 0) > target
        tl.store(token_ids + row, tl.min(tl.where(beyond, at, V), 0).to(tl.int64))


def draw(logits: Tensor, inputs: DrawInputs | None, *, device: DeviceProperties | None = None) -> Tensor:
    """A token for each row of logits [S, V], int64 [S]; see `OpSet.draw`. The last dimension must be dense.

    `device` is what the launches are cut for; None asks Triton's driver.
    """
    num_rows, vocab = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return token_ids
    num_blocks = -(-vocab // _BLOCK)
    cores = (device or device_properties(logits.device)).num_cores
    programs = max(1, min(-(-cores * _PROGRAMS_PER_CORE // num_rows), num_blocks * _BLOCK // _LEAST))
    per_program = -(-num_blocks // programs)
    grid = (num_rows, -(-num_blocks // per_program))
    sizes: dict[str, Any] = {"BLOCK": _BLOCK, "ROWS": 16, "ALL": triton.next_power_of_2(num_blocks), "num_warps": 4}
    maxima = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=logits.device)
    arrived = _arrived(logits.device, max(1024, triton.next_power_of_2(num_rows)))
    row_stride = logits.stride(0)
    _best[grid](logits, row_stride, maxima, arrived, token_ids, vocab, num_blocks, per_program, **sizes)
    if inputs is None:
        return token_ids
    filtered = bool(inputs.max_top_k) or inputs.any_top_p
    masses = torch.empty(num_rows, num_blocks, dtype=torch.int64, device=logits.device)
    listed = maxima
    if filtered:
        listed = torch.empty(num_rows, _LISTED + num_blocks, dtype=torch.int32, device=logits.device)
    _draw[grid](
        logits, row_stride, maxima, masses, listed, arrived, token_ids,
        *(x.contiguous() for x in (inputs.top_k, inputs.top_p, inputs.cut, inputs.u, inputs.scale)),
        vocab, num_blocks, per_program,
        LISTED=_LISTED, FILTERED=filtered, **sizes,
    )  # fmt: skip
    return token_ids


@functools.cache
def _arrived(device: torch.device, size: int) -> Tensor:
    """Counters of a row's programs, which are zero between launches; steps run one after another."""
    return torch.zeros(size, dtype=torch.int32, device=device)
