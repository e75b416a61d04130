"""Cases of paged attention: drawn as metadata and a seed, run against the reference inside a poisoned pool.

canary | block 0 | block 1 | ...                                  | canary
         poison    owned: tokens, then a poisoned tail, padding      compared bitwise after the call
                   not owned: NaN
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from engine_conformance.reference import Expected, attend, excess, visible
from engine_sdk import (
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    Capabilities,
    Domain,
    KVCache,
    KVLayout,
    Platform,
)

Mode = Literal["randn", "sharp", "needle"]

_CANARY = 4096
_ALIGN = 256
_STALE = 50.0
_SENTINEL = 777.0
_NEEDLE = 10.0
"""Score of a planted key: it takes nearly all the weight of whoever sees it."""


def certify(max_examples: int) -> settings:
    """Hypothesis settings for a case that draws `max_examples` times: the same everywhere, so a run can be repeated."""
    return settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=max_examples,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@dataclass(frozen=True)
class Row:
    """A request: `computed` tokens lie in the cache, `new` ones come with the step."""

    computed: int
    new: int

    @property
    def length(self) -> int:
        """Tokens once the step is done."""
        return self.computed + self.new


@dataclass(frozen=True)
class Case:
    """One call of a backend.

    Attributes:
        spec: what it computes.
        block_size: tokens a block.
        rows: the requests; those with one new token come first.
        mode: how values are drawn; ``"needle"`` plants keys at the edges of the mask.
        seed: of the values and of the block table.
        padding: bytes after each block, in units of 256.
        spare_blocks: blocks of the pool that no request owns, at least.
        padding_tokens: tokens after the last request's, which belong to none.
        empty_rows: requests of length 0 among the decodes.
        reads: keys and values are in the cache already and none come with the step.
        fused: q, k and v are slices of one tensor.
        lse: ask for the log-sum-exp.
    """

    spec: AttentionSpec
    block_size: int
    rows: tuple[Row, ...]
    mode: Mode = "randn"
    seed: int = 0
    padding: int = 0
    spare_blocks: int = 3
    padding_tokens: int = 0
    empty_rows: int = 0
    reads: bool = False
    fused: bool = False
    lse: bool = False


def members(domain: Domain, preferred: Iterable[int], count: int = 3) -> list[int]:
    """Some values of a domain: the preferred ones that it has, else its smallest."""
    if found := [value for value in preferred if value in domain]:
        return found
    if domain.values is not None:
        return sorted(domain.values)[:count]
    return [domain.low + i * domain.step for i in range(count) if domain.low + i * domain.step in domain]


@st.composite
def lengths(draw: st.DrawFn, block_size: int, most: int = 6) -> int:
    """A length around the boundaries of blocks."""
    near = draw(st.integers(1, most)) * block_size
    choices = (1, 2, block_size - 1, block_size, block_size + 1, near - 1, near, near + 1, draw(st.integers(1, near)))
    return max(1, draw(st.sampled_from(choices)))


@st.composite
def batches(draw: st.DrawFn, block_size: int) -> tuple[Row, ...]:
    """Decodes, then chunks after a prefix, and whole prompts."""
    decodes = [Row(draw(lengths(block_size)) - 1, 1) for _ in range(draw(st.integers(0, 5)))]
    others = []
    for _ in range(draw(st.integers(0 if decodes else 1, 3))):
        new = max(2, draw(lengths(block_size, 3)))
        others.append(Row(draw(st.sampled_from((0, draw(lengths(block_size, 3))))), new))
    return (*decodes, *others)


@st.composite
def specs(draw: st.DrawFn, declared: Capabilities, feature: str, block_size: int) -> AttentionSpec:
    """A layer of one feature (``"causal"`` for none), within what is declared otherwise."""
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from((1, 4, 7, 8)))
    head_dim = draw(st.sampled_from(members(declared.head_dims, (16, 64, 80, 128))))
    dtype = draw(st.sampled_from(sorted(declared.dtypes, key=str)))
    near = (1, block_size - 1, block_size, block_size + 1, 3 * block_size)
    spec = AttentionSpec(
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        scale=draw(st.sampled_from((head_dim**-0.5, 0.05, 0.2))),
        dtype=dtype,
        kv_dtype=dtype,
    )
    match feature:
        case "sliding_window":
            return replace(spec, window=max(1, draw(st.sampled_from(near))))
        case "chunked":
            return replace(spec, chunk=max(1, draw(st.sampled_from(near))))
        case "softcap":
            return replace(spec, softcap=draw(st.sampled_from((0.5, 5.0, 30.0))))
        case "sinks":
            return replace(spec, sinks=True, window=draw(st.sampled_from((None, max(1, block_size - 1)))))
        case "alibi":
            return replace(spec, alibi=True)
        case "v_head_dim":
            return replace(spec, v_head_dim=draw(st.sampled_from((8, 48, 72))))
        case "bidirectional":
            return replace(spec, causal=False)
    return spec


@st.composite
def cases(draw: st.DrawFn, declared: Capabilities, feature: str = "causal") -> Case:
    """A batch of one feature, in a pool of random order."""
    block_size = draw(st.sampled_from(members(declared.block_sizes, (8, 16, 32))))
    return Case(
        spec=draw(specs(declared, feature, block_size)),
        block_size=block_size,
        rows=draw(batches(block_size)),
        mode=draw(st.sampled_from(("randn", "sharp", "needle"))),
        seed=draw(st.integers(0, 2**31)),
        padding=draw(st.integers(0, 2)),
        spare_blocks=draw(st.sampled_from((1, 7, 400))),
        padding_tokens=draw(st.sampled_from((0, 0, 3))),
        empty_rows=draw(st.sampled_from((0, 0, 2))),
        reads=draw(st.sampled_from((False, False, False, True))),
        fused=draw(st.booleans()),
        lse=feature == "lse",
    )


@dataclass
class Arena:
    """A case made concrete: everything that a call of the backend needs, and what must come out.

    Attributes:
        buffer: uint8, canary, pool and canary; `after` is what must be in it once the call is done.
        ignored: where block 0 lies, if the layout keeps blocks in one piece.
        cache, after_cache: what the layout bound to `buffer` and to `after`.
        tokens: q, k and v of the step, on the device like `sinks` and `alibi_slopes`.
        expected: of each request.
    """

    case: Case
    layout: KVLayout
    batch: AttentionBatch
    buffer: Tensor
    after: Tensor
    ignored: slice
    cache: KVCache
    after_cache: KVCache
    tokens: tuple[Tensor, ...]
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    expected: list[Expected]


def bind(layout: KVLayout, num_blocks: int, padding: int, device: torch.device) -> tuple[Tensor, int, int, KVCache]:
    """A pool of NaN between canaries: the whole buffer, where the pool begins, a block's bytes, and the bound cache."""
    pitch = -(-layout.block_bytes // _ALIGN) * _ALIGN + padding * _ALIGN
    buffer = torch.full((2 * _CANARY + _ALIGN + num_blocks * pitch,), 0xFF, dtype=torch.uint8, device=device)
    begin = _CANARY + -(buffer.data_ptr() + _CANARY) % _ALIGN
    buffer[:begin] = 0xA5
    buffer[begin + num_blocks * pitch :] = 0xA5
    return buffer, begin, pitch, layout.bind(buffer[begin : begin + num_blocks * pitch], num_blocks)


@dataclass
class _Request:
    """A request's row with its values: q [new, H, D], keys [length, K, D], values [length, K, E], and its blocks."""

    row: Row
    q: Tensor
    keys: Tensor
    values: Tensor
    blocks: list[int]


class _Values:
    """Draws tensors of a case, the same for the same seed."""

    def __init__(self, case: Case) -> None:
        self.spec = case.spec
        self.generator = torch.Generator().manual_seed(case.seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def tokens(self, count: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of `count` tokens, in the dtype of the layer."""
        spec = self.spec
        shapes = (
            (spec.num_heads, spec.head_dim),
            (spec.num_kv_heads, spec.head_dim),
            (spec.num_kv_heads, spec.v_head_dim),
        )
        q, k, v = ((self.randn(count, *shape) * scale).to(spec.dtype) for shape in shapes)
        return q, k, v

    def poison(self, num_blocks: int, size: int, nan: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of blocks, in the dtype of the cache: NaN, or finite values that would show."""
        spec = self.spec
        shapes = ((num_blocks, size, spec.num_kv_heads, dim) for dim in (spec.head_dim, spec.v_head_dim))
        k, v = (torch.full(s, torch.nan) if nan else self.randn(*s) * _STALE for s in shapes)
        return k.to(spec.kv_dtype), v.to(spec.kv_dtype)


def prepare(backend: AttentionBackend, case: Case, declared: Capabilities, device: torch.device) -> Arena:
    """Draw the values, fill the pool, and compute what must come out."""
    spec, size, draw, rng = case.spec, case.block_size, _Values(case), random.Random(case.seed)

    # Block ids: shuffled and interleaved over the whole pool. Block 0 is nobody's.
    counts = [-(-row.length // size) for row in case.rows]
    num_blocks = 1 + sum(counts) + case.spare_blocks
    free = rng.sample(range(1, num_blocks), num_blocks - 1)
    requests = [
        _Request(row, *_values(case, row, draw, rng), [free.pop() for _ in range(count)])
        for row, count in zip(case.rows, counts, strict=True)
    ]
    sinks = draw.randn(spec.num_heads) * 2 if spec.sinks else None
    slopes = draw.randn(spec.num_heads).abs() if spec.alibi else None

    layout = backend.layout(size)
    buffer, begin, pitch, cache = bind(layout, num_blocks, case.padding, device)
    poison = [draw.poison(count, size, declared.nan_safe and rng.random() < 0.5) for count in counts]
    layout.import_blocks(cache, *_on(device, torch.tensor([0]), *draw.poison(1, size, declared.nan_safe)))
    for request, tail in zip(requests, poison, strict=True):
        known = request.row.length if case.reads else request.row.computed
        layout.import_blocks(cache, *_on(device, *_image(request, known, tail)))
    after = buffer.clone()
    after_cache = layout.bind(after[begin : begin + num_blocks * pitch], num_blocks)
    for request, tail in zip(requests, poison, strict=True):
        layout.import_blocks(after_cache, *_on(device, *_image(request, request.row.length, tail)))

    # Empty requests are decodes too, and come after the others.
    empty = [_Request(Row(0, 1), *draw.tokens(1, _STALE), []) for _ in range(case.empty_rows)]
    num_real = sum(row.new == 1 for row in case.rows)
    batch = [*requests[:num_real], *empty, *requests[num_real:]]
    news = [(r.q, r.keys[r.row.computed :], r.values[r.row.computed :]) for r in batch]
    parts = zip(*news, draw.tokens(case.padding_tokens, _STALE), strict=True)
    q, k, v = _on(device, *(torch.cat(part) for part in parts))
    return Arena(
        case=case,
        layout=layout,
        batch=_batch(case, batch, rng, device, free if declared.nan_safe else []),
        buffer=buffer,
        after=after,
        ignored=slice(begin, begin + pitch),
        cache=cache,
        after_cache=after_cache,
        tokens=_fused(q, k, v) if case.fused else (q, k, v),
        sinks=None if sinks is None else sinks.to(device),
        alibi_slopes=None if slopes is None else slopes.to(device),
        expected=[
            attend(
                spec,
                request.q,
                request.keys.to(spec.kv_dtype),
                request.values.to(spec.kv_dtype),
                sinks=sinks,
                alibi_slopes=slopes,
                numerics=declared.numerics,
            )
            for request in requests
        ],
    )


def _values(case: Case, row: Row, draw: _Values, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    q, keys, values = draw.tokens(row.length)
    q = q[row.computed :] * (4.0 if case.mode == "sharp" else 1.0)
    if case.mode == "needle":
        plant(case.spec, q, keys, rng)
    return q, keys, values


def _on(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(device) for x in tensors)


def _image(request: _Request, known: int, poison: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The request's blocks once `known` tokens are written, and poison after them, as `import_blocks` takes them."""
    images = []
    for background, data in zip(poison, (request.keys, request.values), strict=True):
        image = background.clone()
        image.view(-1, *data.shape[1:])[:known] = data[:known].to(image.dtype)
        images.append(image)
    return torch.tensor(request.blocks), images[0], images[1]


def _fused(*parts: Tensor) -> tuple[Tensor, ...]:
    """The same values as slices of one tensor, as a fused projection makes them."""
    whole = torch.cat([x.flatten(1) for x in parts], 1)
    widths = [x[0].numel() for x in parts]
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
    case: Case, requests: list[_Request], rng: random.Random, device: torch.device, strangers: list[int]
) -> AttentionBatch:
    # Columns past a request's blocks hold what was there before; blocks that no query sees any more are 0.
    size, rows = case.block_size, [request.row for request in requests]
    width = max(len(request.blocks) for request in requests) + 2
    table = torch.tensor([[rng.choice([0, *strangers]) for _ in range(width)] for _ in rows], dtype=torch.int32)
    slots = []
    for index, request in enumerate(requests):
        row, blocks = request.row, request.blocks
        if not blocks:
            slots.append(0)
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


def run(backend: AttentionBackend, arena: Arena) -> tuple[Tensor, Tensor | None]:
    """Plan and call the backend; outputs [N, H, E] and [N, H] were filled with a sentinel before."""
    q, k, v = arena.tokens
    out = torch.full((*q.shape[:2], v.shape[2]), _SENTINEL, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], _SENTINEL, device=q.device) if arena.case.lse else None
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
    _check_pool(arena)
    return _check_output(arena, out, lse)


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
        f"the pool begins at {arena.ignored.start} and a block has {arena.ignored.stop - arena.ignored.start} bytes"
    )


def _check_output(arena: Arena, out: Tensor, lse: Tensor | None) -> float:
    case, worst = arena.case, 0.0
    num_real = sum(row.new == 1 for row in case.rows)
    position = 0
    for index, (row, expected) in enumerate(zip(case.rows, arena.expected, strict=True)):
        position += case.empty_rows if index == num_real else 0
        mine = slice(position, position + row.new)
        position += row.new
        ratio = excess(out[mine], expected.out, expected.bound)
        assert ratio <= 1, f"request {index} ({row}): the output's error is {ratio:.3g} times its bound"
        worst = max(worst, ratio)
        if lse is not None:
            ratio = excess(lse[mine], expected.lse, expected.lse_bound)
            assert ratio <= 1, f"request {index} ({row}): the log-sum-exp's error is {ratio:.3g} times its bound"
    padding = out[out.shape[0] - case.padding_tokens :]
    assert (padding == _SENTINEL).all(), "the output of padding tokens was written"
    return worst
