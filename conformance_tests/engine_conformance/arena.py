"""A case made concrete: values, a poisoned pool, what the backend must do with them, and the check that it did.

canary | block 0 | block 1 | ...                                  | canary
         poison    owned: tokens, then a poisoned tail, padding      compared bitwise after the call
                   not owned: NaN
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from engine_conformance.cases import Case, Row
from engine_conformance.reference import Expected, attend, cached, excess, visible
from engine_sdk import (
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    Capabilities,
    KVCache,
    KVLayout,
    Platform,
)

CANARY = 4096
_ALIGN = 256
_STALE = 50.0
_SENTINEL = 777.0
_NEEDLE = 10.0
"""Score of a planted key: it takes nearly all the weight of whoever sees it."""
_SUNK = 120.0
"""How far below zero all scores lie in mode ``"sunk"``: their exponentials are zero in fp32."""


@dataclass
class Arena:
    """A case made concrete: everything that a call of the backend needs, and what must come out.

    Attributes:
        buffer: uint8, canary, pool and canary; `after` is what must be in it once the call is done.
        pool: where in both the pool lies; `pitch` is a block's bytes in it.
        cache, after_cache: what the layout bound to `buffer` and to `after`.
        tokens: q, k and v of the step, on the device like `sinks` and `alibi_slopes`.
        requests: values and blocks of each request of the case.
        expected: of each request.
    """

    case: Case
    layout: KVLayout
    batch: AttentionBatch
    buffer: Tensor
    after: Tensor
    pool: slice
    pitch: int
    cache: KVCache
    after_cache: KVCache
    tokens: tuple[Tensor, ...]
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    requests: list[Request]
    expected: list[Expected]

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, block 0 included."""
        return (self.pool.stop - self.pool.start) // self.pitch  # type: ignore[no-any-return]


@dataclass
class Request:
    """A request's row with its values: q [new, H, D], keys [length, K, D], values [length, K, E], and its blocks.

    The first `num_shared` blocks are another request's.
    """

    row: Row
    q: Tensor
    keys: Tensor
    values: Tensor
    blocks: list[int]
    num_shared: int = 0


def aligned(nbytes: int, fill: int, device: torch.device) -> Tensor:
    """A byte tensor as the contract promises storage: aligned to 256 bytes."""
    buffer = torch.full((nbytes + _ALIGN,), fill, dtype=torch.uint8, device=device)
    offset = -buffer.data_ptr() % _ALIGN
    return buffer[offset : offset + nbytes]


def bind(layout: KVLayout, num_blocks: int, padding: int, device: torch.device) -> tuple[Tensor, int, int, KVCache]:
    """A pool of NaN between canaries: the whole buffer, where the pool begins, a block's bytes, and the bound cache."""
    pitch = -(-layout.block_bytes // _ALIGN) * _ALIGN + padding * _ALIGN
    buffer = aligned(2 * CANARY + num_blocks * pitch, 0xFF, device)
    end = CANARY + num_blocks * pitch
    buffer[:CANARY] = 0xA5
    buffer[end:] = 0xA5
    return buffer, CANARY, pitch, layout.bind(buffer[CANARY:end], num_blocks)


class _Values:
    """Draws tensors of a case, the same for the same seed."""

    def __init__(self, case: Case) -> None:
        self.case, self.spec = case, case.spec
        self.generator = torch.Generator().manual_seed(case.seed)
        self._direction = self.randn(self.spec.num_kv_heads, self.spec.head_dim).sign()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def tokens(self, count: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of `count` tokens, in the dtype of the layer."""
        spec, mode = self.spec, self.case.mode
        q, k, v = (
            self.randn(count, *shape) * scale
            for shape in (
                (spec.num_heads, spec.head_dim),
                (spec.num_kv_heads, spec.head_dim),
                (spec.num_kv_heads, spec.v_head_dim),
            )
        )
        if mode == "sharp":
            q = q * 4
        elif mode == "large":
            q, v = q * 30, v * 100
        elif mode == "flat":
            q, v = q / 100, 1 + v.abs() / 4
        elif mode == "sunk":
            k = self._direction + k / 10
            away = self._direction.repeat_interleave(spec.num_heads // spec.num_kv_heads, 0)
            q = q - away * (_SUNK / (spec.scale * spec.head_dim))
        return q.to(spec.dtype), k.to(spec.dtype), v.to(spec.dtype)

    def poison(self, num_blocks: int, size: int, nan: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of blocks, in the dtype of the cache: NaN, or finite values that would show."""
        spec = self.spec
        shapes = ((num_blocks, size, spec.num_kv_heads, dim) for dim in (spec.head_dim, spec.v_head_dim))
        k, v = (torch.full(s, torch.nan) if nan else self.randn(*s) * _STALE for s in shapes)
        return cached(k, spec.kv_dtype), cached(v, spec.kv_dtype)


def prepare(backend: AttentionBackend, case: Case, declared: Capabilities, device: torch.device) -> Arena:
    """Draw the values, fill the pool, and compute what must come out."""
    spec, size, draw, rng = case.spec, case.block_size, _Values(case), random.Random(case.seed)

    # Block ids: shuffled and interleaved over the whole pool. Block 0 is nobody's.
    counts = [-(-row.length // size) for row in case.rows]
    num_blocks = max(case.num_blocks, 1 + sum(counts) + case.spare_blocks)
    free = rng.sample(range(1, num_blocks), num_blocks - 1)
    requests = _requests(case, counts, free, draw, rng)
    sinks = draw.randn(spec.num_heads) * 2 if spec.sinks else None
    slopes = draw.randn(spec.num_heads).abs() if spec.alibi else None
    if spec.relative is not None:
        slopes = draw.randn(spec.num_heads, 2 * spec.relative + 1) * 2
    if case.neutral:
        sinks = None if sinks is None else torch.full_like(sinks, -torch.inf)
        slopes = None if slopes is None else torch.zeros_like(slopes)

    layout = backend.layout(size)
    buffer, begin, pitch, cache = bind(layout, num_blocks, case.padding, device)
    pool = slice(begin, begin + num_blocks * pitch)
    poison = [draw.poison(count, size, declared.nan_safe and rng.random() < 0.5) for count in counts]
    layout.import_blocks(cache, *on(device, torch.tensor([0]), *draw.poison(1, size, declared.nan_safe)))
    for request, tail in zip(requests, poison, strict=True):
        known = request.row.length if case.reads else request.row.computed
        layout.import_blocks(cache, *on(device, *_image(request, known, tail)))
    after = aligned(buffer.numel(), 0, device)
    after.copy_(buffer)
    after_cache = layout.bind(after[pool], num_blocks)
    for request, tail in zip(requests, poison, strict=True):
        layout.import_blocks(after_cache, *on(device, *_image(request, request.row.length, tail)))

    batch = in_batch(case, requests, [Request(row, *draw.tokens(row.new, _STALE), []) for row in _paddings(case)])
    news = [(r.q, r.keys[r.row.computed :], r.values[r.row.computed :]) for r in batch]
    parts = zip(*news, draw.tokens(case.padding_tokens, _STALE), strict=True)
    tokens = on(device, *(torch.cat(part) for part in parts))
    return Arena(
        case=case,
        layout=layout,
        batch=_batch(case, batch, rng, device, free if declared.nan_safe else []),
        buffer=buffer,
        after=after,
        pool=pool,
        pitch=pitch,
        cache=cache,
        after_cache=after_cache,
        tokens=_stored(case, *tokens),
        sinks=None if sinks is None else sinks.to(device),
        alibi_slopes=None if slopes is None else slopes.to(device),
        requests=requests,
        expected=[
            attend(
                spec,
                request.q,
                cached(request.keys, spec.kv_dtype),
                cached(request.values, spec.kv_dtype),
                sinks=sinks,
                alibi_slopes=slopes,
                numerics=declared.numerics,
            )
            for request in requests
        ],
    )


def _requests(case: Case, counts: list[int], free: list[int], draw: _Values, rng: random.Random) -> list[Request]:
    requests = [
        Request(row, *_values(case, row, draw, rng), [free.pop() for _ in range(count)])
        for row, count in zip(case.rows, counts, strict=True)
    ]
    for request in requests:
        if request.row.shares is None:
            continue
        owner = requests[request.row.shares]
        assert owner.row.shares is None, "who shares is not shared with"
        request.num_shared = num = min(request.row.computed, owner.row.length) // case.block_size
        tokens = num * case.block_size
        request.blocks[:num] = owner.blocks[:num]
        request.keys[:tokens], request.values[:tokens] = owner.keys[:tokens], owner.values[:tokens]
    return requests


def _values(case: Case, row: Row, draw: _Values, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    q, keys, values = draw.tokens(row.length)
    q = q[row.computed :]
    if case.mode == "needle":
        plant(case.spec, q, keys, rng)
    return q, keys, values


def _paddings(case: Case) -> list[Row]:
    return [Row(0, 1)] * case.empty_rows + [Row(0, 0)] * case.idle_rows


def in_batch(case: Case, requests: list[Request], paddings: list[Request]) -> list[Request]:
    """The requests in the order of the batch: empty ones with a token are decodes, those without come last."""
    num, empty = case.num_decodes, case.empty_rows
    return [*requests[:num], *paddings[:empty], *requests[num:], *paddings[empty:]]


def on(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on a device."""
    return tuple(x.to(device) for x in tensors)


def _image(request: Request, known: int, poison: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The request's own blocks, `known` tokens written and poison after them, as `import_blocks` takes them."""
    images = []
    for background, data in zip(poison, (request.keys, request.values), strict=True):
        image = background.clone()
        image.view(-1, *data.shape[1:])[:known] = cached(data[:known], image.dtype)
        images.append(image[request.num_shared :])
    return torch.tensor(request.blocks[request.num_shared :], dtype=torch.int64), images[0], images[1]


def _stored(case: Case, *parts: Tensor) -> tuple[Tensor, ...]:
    """The same values, in memory as the case says."""
    match case.memory:
        case "dense":
            return parts
        case "transposed":
            return tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in parts)
    whole = torch.cat([x.flatten(1) for x in parts], 1)
    widths = [x.shape[1] * x.shape[2] for x in parts]
    return tuple(piece.view(x.shape) for piece, x in zip(torch.split(whole, widths, 1), parts, strict=True))


def plant(spec: AttentionSpec, q: Tensor, keys: Tensor, rng: random.Random) -> None:
    """Make keys that match the first or last query at its mask's edges, and just outside them."""
    num_queries, num_keys = q.shape[0], keys.shape[0]
    seen = visible(spec, num_queries, num_keys)
    for row in {0, num_queries - 1}:
        columns = seen[row].nonzero().flatten()
        first, last = int(columns[0]), int(columns[-1])
        edge = rng.choice([j for j in (first - 1, first, last, last + 1) if 0 <= j < num_keys])
        for kv_head in range(spec.num_kv_heads):
            head = kv_head * (spec.num_heads // spec.num_kv_heads) + rng.randrange(spec.num_heads // spec.num_kv_heads)
            target = q[row, head].float()
            keys[edge, kv_head] = (target * (_NEEDLE / (spec.scale * target.square().sum()))).to(keys.dtype)


def _batch(
    case: Case, requests: list[Request], rng: random.Random, device: torch.device, strangers: list[int]
) -> AttentionBatch:
    # Columns past a request's blocks hold what was there before; blocks that no query sees any more are 0.
    size, rows = case.block_size, [request.row for request in requests]
    width = max(case.width, 2 + max(len(request.blocks) for request in requests))
    table = torch.tensor([[rng.choice([0, *strangers]) for _ in range(width)] for _ in rows], dtype=torch.int32)
    slots = []
    for index, request in enumerate(requests):
        row, blocks = request.row, request.blocks
        if not blocks:
            slots += [0] * row.new
            continue
        table[index, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        table[index, : int(visible(case.spec, row.new, row.length)[0].nonzero()[0]) // size] = 0
        slots += [blocks[p // size] * size + p % size for p in range(row.computed, row.length)]
    slots += [rng.randrange(size) for _ in range(case.padding_tokens)]
    starts = torch.tensor([0] + [row.new for row in rows]).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor([r.row.length if r.blocks else 0 for r in requests], dtype=torch.int32)
    return AttentionBatch(
        query_start=starts.to(device),
        seq_lens=seq_lens.to(device),
        block_table=table.to(device),
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        query_start_host=starts,
        seq_lens_host=seq_lens,
        num_decodes=sum(row.new == 1 for row in rows),
        max_query_len=max(row.new for row in rows),
        max_seq_len=max(row.length for row in rows),
        block_size=size,
    )


def outputs(arena: Arena) -> tuple[Tensor, Tensor | None]:
    """Where the backend writes, [N, H, E] and [N, H], full of what must not stay: a number, or NaN."""
    q, _, v = arena.tokens
    garbage = torch.nan if arena.case.seed % 2 else _SENTINEL
    out = torch.full((*q.shape[:2], v.shape[2]), garbage, dtype=q.dtype, device=q.device)
    return out, torch.full(q.shape[:2], garbage, device=q.device) if arena.case.lse else None


def run(backend: AttentionBackend, arena: Arena) -> tuple[Tensor, Tensor | None]:
    """Plan and call the backend."""
    q, k, v = arena.tokens
    out, lse = outputs(arena)
    backend.forward(
        q,
        None if arena.case.reads else k,
        None if arena.case.reads else v,
        arena.cache,
        backend.plan(arena.batch),
        out,
        sinks=arena.sinks,
        alibi_slopes=arena.alibi_slopes,
        lse=lse,
    )
    return out, lse


def check(platform: Platform, backend: AttentionBackend, case: Case) -> float:
    """Run a case and check all that it may and may not have changed; returns the worst error over its bound."""
    device = platform.device()
    arena = prepare(backend, case, platform.capabilities(), device.torch_device)
    given = {"sinks": arena.sinks, "alibi_slopes": arena.alibi_slopes, **vars(arena.batch)}
    inputs = dict(zip("qkv", arena.tokens, strict=True))
    inputs |= {name: x for name, x in given.items() if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in inputs.items()}
    out, lse = run(backend, arena)
    device.synchronize()
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"the input {name} was changed"
    return verify(arena, out, lse, numerics=platform.capabilities().numerics)


def verify(arena: Arena, out: Tensor, lse: Tensor | None, *, numerics: str) -> float:
    """Check the pool and the outputs of a call that is done; returns the worst error over its bound."""
    spec = arena.case.spec
    if spec.kv_dtype.itemsize == 1 and spec.kv_dtype != spec.dtype and not arena.case.reads:
        _accept_codes(arena, numerics)
    _check_pool(arena)
    return _check_output(arena, out, lse)


def _accept_codes(arena: Arena, numerics: str) -> None:
    """Take the codes that a quantiser wrote for the step's tokens, if each is the nearest one or a neighbour of it.

    The reference then dequantises the same bytes.
    """
    case, device = arena.case, arena.buffer.device
    for index, request in enumerate(arena.requests):
        blocks = torch.tensor(request.blocks, dtype=torch.int64, device=device)
        images = []
        for kind, got, want in zip(
            ("keys", "values"),
            arena.layout.export_blocks(arena.cache, blocks),
            arena.layout.export_blocks(arena.after_cache, blocks),
            strict=True,
        ):
            mine, right = got.contiguous().clone(), want.contiguous().clone()
            flat, nearest = mine.flatten(0, 1), right.flatten(0, 1)
            new = slice(request.row.computed, request.row.length)
            near = are_near(flat[new], nearest[new])
            assert near.all(), f"request {index}: {int((~near).sum())} codes of its {kind} are not a nearest one"
            nearest[new] = flat[new]
            images.append(nearest.view_as(right))
        arena.layout.import_blocks(arena.after_cache, blocks, images[0], images[1])
    for index, request in enumerate(arena.requests):
        blocks = torch.tensor(request.blocks, dtype=torch.int64, device=device)
        stored = (x.flatten(0, 1)[: request.row.length] for x in arena.layout.export_blocks(arena.after_cache, blocks))
        keys, values = on(torch.device("cpu"), *stored)
        extra = {n: None if x is None else x.cpu() for n, x in (("sinks", arena.sinks), ("slopes", arena.alibi_slopes))}
        arena.expected[index] = attend(
            case.spec,
            request.q,
            keys,
            values,
            sinks=extra["sinks"],
            alibi_slopes=extra["slopes"],
            numerics="B" if numerics == "B" else "A",
        )


def are_near(codes: Tensor, best: Tensor) -> Tensor:
    """Where 8-bit floats are the nearest ones or neighbours of them; a finite number has no neighbour that is none."""
    a, b = (x.view(torch.uint8).short() for x in (codes, best))
    # Sign and magnitude: neighbours differ by one, and the two zeros are one number.
    near = ((a - b).abs() <= 1) | ((a & 127) + (b & 127) <= 1)
    return near & (codes.float().isfinite() | ~best.float().isfinite())


def _check_pool(arena: Arena) -> None:
    case, spec, device = arena.case, arena.case.spec, arena.buffer.device
    if case.padding_tokens or case.empty_rows:  # they may write into block 0, wherever the layout keeps it
        shape = (1, case.block_size, spec.num_kv_heads)
        nothing = [torch.zeros(*shape, d, dtype=spec.kv_dtype, device=device) for d in (spec.head_dim, spec.v_head_dim)]
        for cache in (arena.cache, arena.after_cache):
            arena.layout.import_blocks(cache, torch.zeros(1, dtype=torch.int64, device=device), *nothing)
    buffer, after = arena.buffer.cpu(), arena.after.cpu()
    changed = (buffer != after).nonzero().flatten()
    assert not len(changed), (
        f"{len(changed)} bytes of the pool differ from what the written slots make, the first at {int(changed[0])}; "
        f"the pool is {arena.pool} and a block has {arena.pitch} bytes"
    )


def _check_output(arena: Arena, out: Tensor, lse: Tensor | None) -> float:
    case, worst = arena.case, 0.0
    assert out.device == arena.tokens[0].device, f"the output lies on {out.device}"
    position = 0
    for index, (row, expected) in enumerate(zip(case.rows, arena.expected, strict=True)):
        position += case.empty_rows if index == case.num_decodes else 0
        mine = slice(position, position + row.new)
        position += row.new
        ratio = excess(out[mine], expected.out, expected.bound)
        assert ratio <= 1, f"request {index} ({row}): the output's error is {ratio:.3g} times its bound"
        worst = max(worst, ratio)
        if lse is not None:
            ratio = excess(lse[mine], expected.lse, expected.lse_bound)
            assert ratio <= 1, f"request {index} ({row}): the log-sum-exp's error is {ratio:.3g} times its bound"
    padding, garbage = (x[out.shape[0] - case.padding_tokens :] for x in (out, outputs(arena)[0]))
    assert torch.equal(padding.view(torch.uint8), garbage.view(torch.uint8)), "the output of padding tokens was written"
    return worst


def request_outputs(arena: Arena, out: Tensor) -> list[Tensor]:
    """The output [new, H, E] of each request of the case."""
    found, position = [], 0
    for index, row in enumerate(arena.case.rows):
        position += arena.case.empty_rows if index == arena.case.num_decodes else 0
        found.append(out[position : position + row.new])
        position += row.new
    return found
