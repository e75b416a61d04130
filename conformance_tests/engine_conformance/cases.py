"""Cases of paged attention: drawn as metadata and a seed, run against the reference inside a poisoned pool.

    canary | block 0 | block 1 | ...                                  | canary
             poison    owned: tokens, then a poisoned tail, padding      compared bitwise after the call
                       not owned: NaN
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
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
        ignored: part of the buffer where padding tokens may write.
        q, k, v, sinks, alibi_slopes: on the device.
        expected: of each request.
    """

    case: Case
    layout: KVLayout
    batch: AttentionBatch
    buffer: Tensor
    after: Tensor
    ignored: slice
    cache: KVCache
    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    expected: list[Expected] = field(default_factory=list)


def bind(layout: KVLayout, num_blocks: int, padding: int, device: torch.device) -> tuple[Tensor, int, int, KVCache]:
    """A pool of NaN between canaries: the whole buffer, where the pool begins, a block's bytes, and the bound cache."""
    pitch = -(-layout.block_bytes // _ALIGN) * _ALIGN + padding * _ALIGN
    buffer = torch.full((2 * _CANARY + _ALIGN + num_blocks * pitch,), 0xFF, dtype=torch.uint8, device=device)
    begin = _CANARY + -(buffer.data_ptr() + _CANARY) % _ALIGN
    buffer[:begin] = 0xA5
    buffer[begin + num_blocks * pitch :] = 0xA5
    return buffer, begin, pitch, layout.bind(buffer[begin : begin + num_blocks * pitch], num_blocks)


def prepare(backend: AttentionBackend, case: Case, declared: Capabilities, device: torch.device) -> Arena:
    """Draw the values, fill the pool, and compute what must come out."""
    spec, size = case.spec, case.block_size
    generator = torch.Generator().manual_seed(case.seed)
    rng = random.Random(case.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(spec.dtype)

    spread = 4.0 if case.mode == "sharp" else 1.0
    qs = [draw(row.new, spec.num_heads, spec.head_dim) * spread for row in case.rows]
    keys = [draw(row.length, spec.num_kv_heads, spec.head_dim) for row in case.rows]
    values = [draw(row.length, spec.num_kv_heads, spec.v_head_dim) for row in case.rows]
    if case.mode == "needle":
        for q, k in zip(qs, keys, strict=True):
            plant(spec, q, k, rng)
    sinks = torch.randn(spec.num_heads, generator=generator) * 2 if spec.sinks else None
    slopes = torch.rand(spec.num_heads, generator=generator) if spec.alibi else None

    # Block ids: shuffled and interleaved over the whole pool. Block 0 is nobody's.
    counts = [-(-row.length // size) for row in case.rows]
    num_blocks = 1 + sum(counts) + case.spare_blocks
    free = rng.sample(range(1, num_blocks), num_blocks - 1)
    owned = [[free.pop() for _ in range(count)] for count in counts]
    layout = backend.layout(size)
    buffer, begin, pitch, cache = bind(layout, num_blocks, case.padding, device)

    def fill(target: KVCache, blocks: list[int], k: Tensor, v: Tensor) -> None:
        layout.import_blocks(target, torch.tensor(blocks, device=device), k.to(device), v.to(device))

    def stale(num: int, nan: bool) -> tuple[Tensor, Tensor]:
        """Blocks of poison: NaN, or finite values that would show."""
        k, v = (
            torch.full((num, size, spec.num_kv_heads, dim), torch.nan) if nan
            else torch.randn(num, size, spec.num_kv_heads, dim, generator=generator) * _STALE
            for dim in (spec.head_dim, spec.v_head_dim)
        )  # fmt: skip
        return k.to(spec.kv_dtype), v.to(spec.kv_dtype)

    fill(cache, [0], *stale(1, declared.nan_safe))
    images = []
    for row, blocks, k, v in zip(case.rows, owned, keys, values, strict=True):
        image_k, image_v = stale(len(blocks), declared.nan_safe and rng.random() < 0.5)
        known = row.length if case.reads else row.computed
        image_k.view(-1, *k.shape[1:])[:known] = k[:known].to(spec.kv_dtype)
        image_v.view(-1, *v.shape[1:])[:known] = v[:known].to(spec.kv_dtype)
        fill(cache, blocks, image_k, image_v)
        images.append((blocks, image_k, image_v))
    after = buffer.clone()
    after_cache = layout.bind(after[begin : begin + num_blocks * pitch], num_blocks)
    for row, (blocks, image_k, image_v), k, v in zip(case.rows, images, keys, values, strict=True):
        image_k.view(-1, *k.shape[1:])[: row.length] = k.to(spec.kv_dtype)
        image_v.view(-1, *v.shape[1:])[: row.length] = v.to(spec.kv_dtype)
        fill(after_cache, blocks, image_k, image_v)

    # Empty rows are decodes too, and come after them.
    num_real = sum(row.new == 1 for row in case.rows)
    rows = [*case.rows[:num_real], *[Row(-1, 1)] * case.empty_rows, *case.rows[num_real:]]
    tables = [*owned[:num_real], *[[]] * case.empty_rows, *owned[num_real:]]
    nothing = (torch.zeros(1, spec.num_heads, spec.head_dim, dtype=spec.dtype), *stale_tokens(spec, 1, generator))
    news = [
        (q, k[row.computed :], v[row.computed :])
        for q, k, v, row in zip(qs, keys, values, case.rows, strict=True)
    ]  # fmt: skip
    news[num_real:num_real] = [nothing] * case.empty_rows
    padding = (draw(case.padding_tokens, spec.num_heads, spec.head_dim), *stale_tokens(spec, case.padding_tokens, generator))
    q, k, v = (torch.cat(parts).to(device) for parts in zip(*news, padding, strict=True))
    if case.fused:
        whole = torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), 1)
        q, k, v = (
            part.unflatten(1, (heads, -1))
            for part, heads in zip(
                whole.split([q[0].numel(), k[0].numel(), v[0].numel()], 1),
                (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads),
                strict=True,
            )
        )
    arena = Arena(
        case=case,
        layout=layout,
        batch=_batch(spec, size, rows, tables, case.padding_tokens, rng, device, free if declared.nan_safe else [0]),
        buffer=buffer,
        after=after,
        ignored=slice(begin, begin + pitch),
        cache=cache,
        q=q,
        k=k,
        v=v,
        sinks=None if sinks is None else sinks.to(device),
        alibi_slopes=None if slopes is None else slopes.to(device),
    )
    for q, k, v in zip(qs, keys, values, strict=True):
        stored = k.to(spec.kv_dtype), v.to(spec.kv_dtype)
        arena.expected.append(
            attend(spec, q, *stored, sinks=sinks, alibi_slopes=slopes, numerics=declared.numerics)
        )  # fmt: skip
    return arena


def stale_tokens(spec: AttentionSpec, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values of tokens that belong to nobody."""
    return (
        (torch.randn(count, spec.num_kv_heads, spec.head_dim, generator=generator) * _STALE).to(spec.dtype),
        (torch.randn(count, spec.num_kv_heads, spec.v_head_dim, generator=generator) * _STALE).to(spec.dtype),
    )


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
    spec: AttentionSpec,
    size: int,
    rows: list[Row],
    tables: list[list[int]],
    padding_tokens: int,
    rng: random.Random,
    device: torch.device,
    strangers: list[int],
) -> AttentionBatch:
    # Columns past a request's blocks hold what was there before; blocks that no query sees any more are 0.
    width = max(map(len, tables)) + 2
    table = torch.tensor([[rng.choice([0, *strangers]) for _ in range(width)] for _ in rows], dtype=torch.int32)
    slots = []
    for index, (row, blocks) in enumerate(zip(rows, tables, strict=True)):
        table[index, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        if blocks:
            low = int(visible(spec, row.new, row.length)[0].nonzero()[0])
            table[index, : low // size] = 0
            slots += [blocks[p // size] * size + p % size for p in range(row.computed, row.length)]
        else:
            slots.append(0)
    slots += [rng.randrange(size) for _ in range(padding_tokens)]
    starts = torch.tensor([0] + [row.new for row in rows]).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor([row.length for row in rows], dtype=torch.int32)
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
    spec, case = arena.case.spec, arena.case
    out = torch.full((*arena.q.shape[:2], spec.v_head_dim), _SENTINEL, dtype=spec.dtype, device=arena.q.device)
    lse = torch.full(arena.q.shape[:2], _SENTINEL, device=arena.q.device) if case.lse else None
    backend.forward(
        arena.q,
        None if case.reads else arena.k,
        None if case.reads else arena.v,
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
    inputs = {name: getattr(arena, name) for name in ("q", "k", "v", "sinks", "alibi_slopes")}
    inputs |= vars(arena.batch)
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
    out, lse = run(backend, arena)
    device.synchronize()

    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"the input {name} was changed"
    buffer, after = arena.buffer.cpu(), arena.after.cpu()
    if case.padding_tokens or case.empty_rows:
        buffer[arena.ignored] = after[arena.ignored] = 0
    changed = (buffer != after).nonzero().flatten()
    assert not len(changed), (
        f"{len(changed)} bytes of the pool differ from what the written slots make, the first at {int(changed[0])}; "
        f"the pool begins at {arena.ignored.start} and a block has {arena.ignored.stop - arena.ignored.start} bytes"
    )
    worst = 0.0
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
