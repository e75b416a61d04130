"""L2: paged attention against the reference, in pools where every byte that must not matter is poison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine_conformance.arena import Arena, are_near, bind, check, prepare, request_outputs, run
from engine_conformance.cases import (
    COMBINED,
    FLOATS8,
    Case,
    Mode,
    Row,
    Scale,
    block,
    bounds,
    cases,
    dtypes,
    layer,
    members,
    of_8_bits,
)
from engine_conformance.reference import UNIT, cached
from engine_sdk import AttentionSpec, Capabilities, Domain, Platform, UnsupportedCapability

FEATURES = (
    "sliding_window",
    "chunked",
    "softcap",
    "sinks",
    "alibi",
    "v_head_dim",
    "bidirectional",
    "two_sided_window",
    "relative_bias",
    "lse",
)

Record = Callable[[str, object], None]


@pytest.mark.parametrize("feature", ["causal", COMBINED, *FEATURES])
def test_agrees_with_reference(
    conformance_platform: Platform,
    capabilities: Capabilities,
    feature: str,
    scale: Scale,
    record_property: Record,
) -> None:
    """Mixed batches with each feature, and with several; one that is not declared is refused before anything runs."""
    worst: dict[torch.dtype, float] = {}

    @scale.certify(250 if feature == "causal" else 150 if feature == COMBINED else 80)
    @given(cases(capabilities, feature, scale))
    def drawn(case: Case) -> None:
        ratio = check(conformance_platform, conformance_platform.attention(case.spec), case)
        worst[case.spec.dtype] = max(worst.get(case.spec.dtype, 0.0), ratio)

    if feature in FEATURES and feature not in capabilities.attention:
        refuses(conformance_platform, capabilities, feature)
        record_property("rejected", feature)
        return
    drawn()
    for dtype, ratio in worst.items():
        record_property(f"error over bound: attention, {str(dtype).removeprefix('torch.')}", ratio)


def with_feature(spec: AttentionSpec, feature: str) -> AttentionSpec:
    """The layer with one feature; with none where the feature is one of the call."""
    asked = {
        "sliding_window": replace(spec, window=8),
        "chunked": replace(spec, chunk=8),
        "softcap": replace(spec, softcap=5.0),
        "sinks": replace(spec, sinks=True),
        "alibi": replace(spec, alibi=True),
        "v_head_dim": replace(spec, v_head_dim=spec.head_dim // 2),
        "bidirectional": replace(spec, causal=False),
        "two_sided_window": replace(spec, causal=False, window=8),
        "relative_bias": replace(spec, causal=False, relative=8),
    }
    return asked.get(feature, spec)


def refuses(platform: Platform, declared: Capabilities, feature: str) -> None:
    """Asking for an undeclared feature raises `UnsupportedCapability` and writes nothing; a plain case still runs."""
    spec = layer(declared)
    plain = Case(spec, block(declared), (Row(3, 1),))
    device = platform.device()
    for rows in ((Row(3, 1),), (Row(0, 9),)):
        if feature != "lse":
            with pytest.raises(UnsupportedCapability) as error:
                platform.attention(with_feature(spec, feature))
            lacking = with_feature(spec, feature).features() - declared.attention  # a window may lack two things
            assert error.value.name in {"attention", *lacking}, f"the refusal of {feature} names {error.value.name}"
            continue
        backend = platform.attention(spec)
        arena = prepare(backend, replace(plain, rows=rows, lse=True), declared, device.torch_device)
        before = arena.buffer.clone()
        with pytest.raises(UnsupportedCapability) as error:
            run(backend, arena)
        assert error.value.name == feature, f"the refusal of {feature} names {error.value.name}"
        device.synchronize()
        assert torch.equal(arena.buffer, before), "the refused call had written to the cache"
    check(platform, platform.attention(spec), plain)


def test_refuses_what_is_not_declared(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Dtypes that are not declared are refused, each with a typed error that names the capability."""
    spec, canary = layer(capabilities), Case(layer(capabilities), block(capabilities), (Row(3, 1),))
    every = {
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int8,
        *FLOATS8,
    }
    for field, declared in (("dtype", capabilities.dtypes), ("kv_dtype", capabilities.kv_dtypes)):
        for dtype in sorted(every - declared, key=str):
            changed = replace(spec, dtype=dtype) if field == "dtype" else replace(spec, kv_dtype=dtype)
            with pytest.raises(UnsupportedCapability) as error:
                conformance_platform.attention(changed)
            assert error.value.name == f"{field}s", f"the refusal of a {field} names {error.value.name}"
            check(conformance_platform, conformance_platform.attention(spec), canary)


def test_refuses_on_every_side(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Head sizes and block sizes below, above and between those that are declared are refused."""
    spec, canary = layer(capabilities), Case(layer(capabilities), block(capabilities), (Row(3, 1),))
    for size in outsides(capabilities.head_dims):
        with pytest.raises(UnsupportedCapability) as error:
            conformance_platform.attention(replace(spec, head_dim=size, v_head_dim=size))
        assert error.value.name == "head_dims", f"the refusal of a head size names {error.value.name}"
        if "v_head_dim" not in capabilities.attention:
            with pytest.raises(UnsupportedCapability):
                conformance_platform.attention(replace(spec, v_head_dim=size))
    for size in outsides(capabilities.block_sizes):
        with pytest.raises(UnsupportedCapability) as error:
            conformance_platform.attention(spec).layout(size)
        assert error.value.name == "block_sizes", f"the refusal of a block size names {error.value.name}"
    check(conformance_platform, conformance_platform.attention(spec), canary)


def outsides(domain: Domain) -> list[int]:
    """Positive integers just outside a domain, on every side that it has."""
    ends = domain.values or {domain.low, domain.low + domain.step, domain.high or domain.low}
    return sorted({n for end in ends for n in (1, end - 1, end + 1, 2 * end) if n > 0 and n not in domain})


def test_every_declared_size(conformance_platform: Platform, capabilities: Capabilities, scale: Scale) -> None:
    """Head sizes and block sizes throughout what is declared, its ends too."""
    sizes = (1, 8, 24, 32, 40, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256, 512)
    heads = sorted({*members(capabilities.head_dims, sizes, 6), *bounds(capabilities.head_dims, 512)})
    heads = [n for n in heads if n <= (scale.max_head_dim or n)] or heads[:1]
    blocks = sorted(
        {*members(capabilities.block_sizes, (1, 4, 5, 16, 48, 64, 128, 256), 6), *bounds(capabilities.block_sizes, 512)}
    )
    rows = (Row(40, 1), Row(0, 1), Row(7, 12))
    for index, head_dim in enumerate(heads):
        for dtype in dtypes(capabilities):
            spec = replace(layer(capabilities, group=2, head_dim=head_dim, dtype=dtype), num_heads=3, num_kv_heads=1)
            case = Case(spec, block(capabilities), rows, mode="needle", seed=index)
            check(conformance_platform, conformance_platform.attention(spec), case)
    for size in blocks:
        near = tuple(Row(n - 1, 1) for n in (size, size + 1, 2 * size, 2 * size + 1))
        case = Case(layer(capabilities), size, (*near, Row(size - 1, size + 1)), mode="needle", seed=size)
        check(conformance_platform, conformance_platform.attention(case.spec), case)


def test_many_heads(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """One key/value head for all, one for each, odd numbers of them, and many."""
    for num_heads, num_kv_heads in ((1, 1), (7, 7), (32, 1), (24, 3), (40, 8), (64, 4), (36, 12)):
        spec = replace(layer(capabilities), num_heads=num_heads, num_kv_heads=num_kv_heads)
        case = Case(spec, block(capabilities), (Row(30, 1), Row(2, 1), Row(5, 9)), mode="needle", seed=num_heads)
        check(conformance_platform, conformance_platform.attention(spec), case)


@pytest.mark.conformance(capability="lse")
def test_sinks_join_the_log_sum_exp(
    conformance_platform: Platform, capabilities: Capabilities, record_property: Record
) -> None:
    """The log-sum-exp is of the whole denominator: sinks, caps, windows and slopes included."""
    if "lse" not in capabilities.attention:
        record_property("rejected", "lse")
        return
    rows = (Row(40, 1), Row(3, 1), Row(5, 30), Row(0, 17))
    for feature in ("causal", "sinks", "softcap", "sliding_window", "alibi"):
        if feature == "causal" or feature in capabilities.attention:
            modes: tuple[Mode, ...] = ("randn", "sharp", "sunk")
            for seed, mode in enumerate(modes):
                spec = with_feature(layer(capabilities, dtype=torch.float32), feature)
                case = Case(spec, block(capabilities), rows, mode=mode, seed=seed, lse=True)
                check(conformance_platform, conformance_platform.attention(spec), case)


def test_kv_dtypes(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Every declared pair of activation and cache dtypes."""
    rows = (Row(20, 1), Row(5, 9), Row(0, 17), Row(40, 30))
    for dtype in dtypes(capabilities):
        for kv_dtype in sorted(capabilities.kv_dtypes, key=str):
            spec = replace(layer(capabilities, dtype=dtype), kv_dtype=kv_dtype)
            backend = conformance_platform.attention(spec)
            for mode in ("randn", "needle"):
                check(conformance_platform, backend, Case(spec, block(capabilities), rows, mode=mode))
                check(conformance_platform, backend, Case(spec, block(capabilities), rows, mode=mode, reads=True))


@of_8_bits
def test_fp8_cache(
    conformance_platform: Platform,
    capabilities: Capabilities,
    kv_dtype: torch.dtype,
    scale: Scale,
    record_property: Record,
) -> None:
    """All keys and values, those of the step too, are rounded to 8 bits, and nothing else is, in any batch."""
    if refuses_cache(conformance_platform, capabilities, kv_dtype, record_property):
        return
    worst = 0.0

    @scale.certify(60)
    @given(cases(capabilities, COMBINED, scale))
    def drawn(case: Case) -> None:
        nonlocal worst
        case = replace(case, spec=replace(case.spec, kv_dtype=kv_dtype))
        worst = max(worst, check(conformance_platform, conformance_platform.attention(case.spec), case))

    drawn()
    record_property(f"error over bound: attention, {str(kv_dtype).removeprefix('torch.')} cache", worst)


def refuses_cache(platform: Platform, declared: Capabilities, kv_dtype: torch.dtype, record_property: Record) -> bool:
    """Whether a cache of `kv_dtype` is not declared; then it is refused, and a plain case still runs."""
    if kv_dtype in declared.kv_dtypes:
        return False
    spec = layer(declared)
    with pytest.raises(UnsupportedCapability) as error:
        platform.attention(replace(spec, kv_dtype=kv_dtype))
    assert error.value.name == "kv_dtypes", f"the refusal of {kv_dtype} names {error.value.name}"
    check(platform, platform.attention(spec), Case(spec, block(declared), (Row(3, 1),)))
    record_property("rejected", f"kv_dtypes.{str(kv_dtype).removeprefix('torch.')}")
    return True


@of_8_bits
def test_fp8_writes(
    conformance_platform: Platform, capabilities: Capabilities, kv_dtype: torch.dtype, record_property: Record
) -> None:
    """Numbers too large for 8 bits become the largest, of their sign; others the nearest, now and then a neighbour."""
    if refuses_cache(conformance_platform, capabilities, kv_dtype, record_property):
        return
    size, device = block(capabilities), conformance_platform.device()
    largest = torch.finfo(kv_dtype).max
    for dtype in dtypes(capabilities):
        spec = replace(layer(capabilities, dtype=dtype), kv_dtype=kv_dtype)
        backend = conformance_platform.attention(spec)
        case = Case(spec, size, (Row(size - 1, 1), Row(3, 2 * size)))
        arena = prepare(backend, case, capabilities, device.torch_device)
        generator, most = torch.Generator().manual_seed(0), torch.finfo(dtype).max

        def wide(x: Tensor, generator: torch.Generator = generator, most: float = most) -> Tensor:
            """Of all sizes, from below the smallest number of 8 bits, and the edges of saturation."""
            drawn = (
                torch.randn(x.shape, generator=generator)
                * torch.rand(x.shape, generator=generator).mul(34).sub(18).exp2()
            )
            edges = largest * torch.tensor([1.0, 1.03, 1.05, 1.0625, 1.07, 1.125, 1.25, 1e30])
            edges = torch.cat([edges, -edges]).clamp(-most, most)
            drawn[:, :, : len(edges)] = edges[torch.arange(x.shape[2])[: len(edges)]]
            return drawn.clamp(-most, most).to(x)

        q, k, v = arena.tokens
        arena.tokens = torch.zeros_like(q), wide(k), wide(v)
        run(backend, arena)
        device.synchronize()
        at = arena.batch.slots
        for got, x in zip(
            arena.layout.export_blocks(arena.cache, at // size), (a.cpu() for a in arena.tokens[1:]), strict=True
        ):
            codes, best = got.cpu()[torch.arange(len(at)), (at % size).cpu()], cached(x, kv_dtype)
            over = x.float().abs() >= largest
            assert torch.equal(codes.float()[over], best.float()[over]), f"{dtype} beyond {largest:g} does not saturate"
            assert are_near(codes, best).all(), f"{dtype}: a code is neither the nearest nor a neighbour of it"
            missed = float((codes.float() != best.float()).float().mean())
            assert missed <= 1 / 16, f"{dtype}: {missed:.0%} of the codes are not the nearest one"


def test_writes_keep_every_bit(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Where cache and activations have one dtype, the cache holds the bits of the keys and values, large or small."""
    size, device = block(capabilities), conformance_platform.device()
    for dtype in dtypes(capabilities):
        if dtype not in capabilities.kv_dtypes:
            continue
        spec = layer(capabilities, dtype=dtype)
        backend = conformance_platform.attention(spec)
        arena = prepare(
            backend, Case(spec, size, (Row(size - 1, 1), Row(3, 2 * size))), capabilities, device.torch_device
        )
        q, k, v = arena.tokens
        finfo, generator = torch.finfo(dtype), torch.Generator().manual_seed(0)

        def extreme(x: Tensor, finfo: torch.finfo = finfo, generator: torch.Generator = generator) -> Tensor:
            choices = torch.tensor(
                [finfo.max, finfo.min, finfo.tiny, -finfo.tiny, 0.0, 1 + finfo.eps, -1.0], dtype=x.dtype
            )
            return choices[torch.randint(len(choices), x.shape, generator=generator)].to(x.device)

        arena.tokens = torch.zeros_like(q), extreme(k), extreme(v)
        run(backend, arena)
        device.synchronize()
        at = arena.batch.slots
        blocks = at // size
        for got, want in zip(arena.layout.export_blocks(arena.cache, blocks), arena.tokens[1:], strict=True):
            written = got[torch.arange(len(at), device=at.device), at % size]
            assert torch.equal(written.cpu().view(torch.uint8), want.cpu().view(torch.uint8)), dtype


def test_long_rows(conformance_platform: Platform, capabilities: Capabilities, scale: Scale) -> None:
    """Sequences long enough to be split, beside short ones."""
    rows: tuple[Row, ...] = (Row(0, 1), Row(4000, 1), Row(17, 1), Row(2500, 100), Row(0, 1100))
    if scale.max_tokens is not None:
        rows = (Row(0, 1), Row(scale.max_tokens - 1, 1), Row(17, 1), Row(9, 20))
    modes: tuple[Mode, ...] = ("sharp", "needle", "sunk")
    for mode, dtype in zip(modes, [*dtypes(capabilities), *dtypes(capabilities)], strict=False):
        spec = layer(capabilities, dtype=dtype)
        case = Case(spec, block(capabilities), rows, mode=mode)
        check(conformance_platform, conformance_platform.attention(spec), case)


def test_prompts_in_large_tiles(conformance_platform: Platform, capabilities: Capabilities, scale: Scale) -> None:
    """Prompts of more rows than a large tile has, in blocks as long as a tile, beside decodes."""
    rows: tuple[Row, ...] = (Row(300, 1), Row(0, 1), Row(0, 200), Row(185, 130), Row(63, 66), Row(64, 64), Row(0, 2))
    if scale.max_tokens is not None:
        rows = (Row(0, 1), Row(3, scale.max_tokens // 2), Row(0, scale.max_tokens // 3))
    size = members(capabilities.block_sizes, (64,))[0]
    spec = layer(capabilities, head_dim=members(capabilities.head_dims, (scale.max_head_dim or 128,))[0])
    for mode in ("needle", "sharp"):
        check(conformance_platform, conformance_platform.attention(spec), Case(spec, size, rows, mode=mode))


def test_very_long_rows(conformance_platform: Platform, capabilities: Capabilities, scale: Scale) -> None:
    """Beyond the sizes that tables of splits and workspaces are made for; sums of many equal terms do not stall."""
    spec = replace(layer(capabilities, group=2), num_heads=2, num_kv_heads=1)
    modes: tuple[Mode, ...] = ("needle", "needle", "flat", "flat")
    size = block(capabilities)
    for seed, mode in enumerate(modes):
        rows: tuple[Row, ...] = (
            Row(scale.tokens(8_700, size) - 1, 1),
            Row(3, 1),
            Row(scale.tokens(33_000, size) - 1, 1),
        )
        if seed % 2:
            rows = (Row(0, 1), Row(scale.tokens(9_001, size) - 9, 9))
        for dtype in dtypes(capabilities) if mode == "flat" else [spec.dtype]:
            long = replace(spec, dtype=dtype, kv_dtype=dtype)
            case = Case(long, size, rows, mode=mode, seed=seed)
            check(conformance_platform, conformance_platform.attention(long), case)


def test_needle_in_every_part(conformance_platform: Platform, capabilities: Capabilities, scale: Scale) -> None:
    """Decodes of lengths on both sides of powers of two and of multiples of them: no part of a split is lost."""
    ends = sorted({n + d for n in (32, 64, 128, 192, 256, 384, 512, 768, 1024) for d in (-1, 0, 1)})
    rows = tuple(Row(scale.tokens(n, block(capabilities)) - 1, 1) for n in ends)
    for seed in range(3):
        spec = layer(capabilities, group=1)
        case = Case(spec, block(capabilities), rows, mode="needle", seed=seed)
        check(conformance_platform, conformance_platform.attention(spec), case)


def test_many_rows(conformance_platform: Platform, capabilities: Capabilities, scale: Scale) -> None:
    """A large batch of decodes of all lengths: none borrows another's length or table."""
    spec = layer(capabilities, group=1)
    rows = tuple(Row(scale.tokens(1 + 11 * i % 230, block(capabilities)) - 1, 1) for i in range(96))
    case = Case(spec, block(capabilities), rows, mode="needle")
    check(conformance_platform, conformance_platform.attention(spec), case)
    prompts = tuple(Row(0, 2 + 7 * i % 40) for i in range(40))
    check(conformance_platform, conformance_platform.attention(spec), replace(case, rows=prompts))


@pytest.mark.parametrize("empty", [0, 70])
def test_more_rows_than_a_tile(conformance_platform: Platform, capabilities: Capabilities, empty: int) -> None:
    """Hundreds of short decodes, some of them empty."""
    spec = layer(capabilities, group=1)
    rows = tuple(Row(i % 5, 1) for i in range(301 - empty))
    case = Case(spec, block(capabilities), rows, empty_rows=empty, mode="needle")
    check(conformance_platform, conformance_platform.attention(spec), case)


def test_block_ids_are_wide(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Block ids beyond 16 bits."""
    size = min(capabilities.head_dims.values or {16}, default=16)
    spec = replace(
        layer(capabilities, group=1, head_dim=members(capabilities.head_dims, (size,))[0]), num_heads=1, num_kv_heads=1
    )
    case = Case(spec, block(capabilities), (Row(100, 1), Row(30, 20)), spare_blocks=70_000)
    check(conformance_platform, conformance_platform.attention(spec), case)


def test_block_offsets_are_wide(
    conformance_platform: Platform, capabilities: Capabilities, record_property: Record
) -> None:
    """Blocks that lie beyond two billion elements, and four billion bytes, of their pool."""
    device, size, spec = conformance_platform.device(), block(capabilities), layer(capabilities, group=1)
    backend = conformance_platform.attention(spec)
    arena = prepare(backend, Case(spec, size, (Row(2 * size, 1), Row(3, size))), capabilities, device.torch_device)
    want, _ = run(backend, arena)
    pitch = max(1 << 20, arena.pitch)
    num_blocks = (1 << 32) // pitch + arena.num_blocks
    if device.memory_info().free < 2 * num_blocks * pitch:
        record_property("inconclusive", f"{num_blocks * pitch >> 20} MiB are wanted, and fewer than twice as many free")
        return
    storage = torch.empty(num_blocks * pitch + 256, dtype=torch.uint8, device=device.torch_device)
    storage = storage[-storage.data_ptr() % 256 :][: num_blocks * pitch]
    layout, cache = arena.layout, arena.layout.bind(storage, num_blocks)
    held = torch.arange(arena.num_blocks, device=device.torch_device)
    moved = torch.where(held > 0, held + num_blocks - arena.num_blocks, 0)
    layout.import_blocks(
        cache, moved, *layout.export_blocks(prepare(backend, arena.case, capabilities, held.device).cache, held)
    )
    batch, (q, k, v) = arena.batch, arena.tokens
    batch = replace(
        batch,
        block_table=moved[batch.block_table.long()].int(),
        slots=moved[batch.slots // size] * size + batch.slots % size,
    )
    out = torch.full_like(want, torch.nan)
    backend.forward(q, k, v, cache, backend.plan(batch), out)
    same_bits(capabilities, out, want)
    for got, expected in zip(layout.export_blocks(cache, moved), layout.export_blocks(arena.cache, held), strict=True):
        assert torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def test_plan_serves_all_layers(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """One plan, two layers with values of their own, and another step's plan in between."""
    device = conformance_platform.device().torch_device
    spec, size = layer(capabilities), block(capabilities)
    backend = conformance_platform.attention(spec)
    case = Case(spec, size, (Row(40, 1), Row(5, 1), Row(3, 20)))
    first, second = (prepare(backend, replace(case, seed=seed), capabilities, device) for seed in (1, 2))
    plan = backend.plan(first.batch)
    run(backend, prepare(backend, Case(spec, size, (Row(90, 1),), seed=3), capabilities, device))
    outs = []
    for arena in (first, second):
        q, k, v = arena.tokens
        out = torch.zeros_like(q)
        backend.forward(q, k, v, first.cache, plan, out)
        outs.append(out)
    assert not torch.equal(*outs)
    # The second call wrote over the new tokens alone, so a third that writes the first ones again gives the first.
    same_bits(capabilities, run(backend, first)[0], outs[0])


def test_plans_of_two_steps(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """The next step is planned before this one runs, in tensors of its own; each plan keeps its step."""
    device = conformance_platform.device().torch_device
    spec, size = layer(capabilities), block(capabilities)
    backend = conformance_platform.attention(spec)
    steps = [
        prepare(backend, Case(spec, size, rows, seed=7, mode="needle"), capabilities, device)
        for rows in ((Row(40, 1), Row(5, 1)), (Row(3, 1), Row(60, 1), Row(0, 19)), (Row(0, 33),))
    ]
    plans = [backend.plan(arena.batch) for arena in steps]
    for index in (2, 0, 1):
        arena = steps[index]
        want, _ = run(backend, prepare(backend, arena.case, capabilities, device))
        q, k, v = arena.tokens
        out = torch.zeros_like(q)
        backend.forward(q, k, v, arena.cache, plans[index], out)
        same_bits(capabilities, out, want)


def test_steps_of_equal_sizes(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Steps of as many requests and tokens, and other lengths, tables and splits of the tokens: nothing is kept."""
    spec, size = layer(capabilities), block(capabilities)
    backend = conformance_platform.attention(spec)
    steps = [
        (Row(40, 1), Row(5, 1), Row(0, 19), Row(8, 5)),
        (Row(3, 1), Row(60, 1), Row(7, 19), Row(0, 5)),
        (Row(3, 1), Row(60, 1), Row(7, 5), Row(30, 19)),
        (Row(60, 1), Row(3, 1), Row(30, 12), Row(7, 12)),
    ]
    for seed, rows in enumerate([*steps, *steps]):
        case = Case(spec, size, rows, seed=seed, mode="needle", num_blocks=64, width=16)
        check(conformance_platform, backend, case)
        check(conformance_platform, backend, replace(case, rows=rows[:2]))


def test_permuted_blocks_give_the_same_bits(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Where a block lies does not matter."""
    spec, size = layer(capabilities), block(capabilities)
    backend = conformance_platform.attention(spec)
    device = conformance_platform.device().torch_device
    case = Case(spec, size, (Row(40, 1), Row(5, 1), Row(3, 20)), seed=5)
    here, there = (prepare(backend, c, capabilities, device) for c in (case, replace(case, spare_blocks=90, padding=2)))
    assert all(torch.equal(a, b) for a, b in zip(here.tokens, there.tokens, strict=True))
    assert not torch.equal(here.batch.block_table, there.batch.block_table)
    same_bits(capabilities, run(backend, here)[0], run(backend, there)[0])


def same_bits(declared: Capabilities, a: Tensor, b: Tensor) -> None:
    """Assert equal bits, or equal values but for rounding where the platform says that it is not deterministic."""
    if declared.deterministic:
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b)


@pytest.mark.conformance(capability="deterministic")
def test_same_call_gives_the_same_bits(
    conformance_platform: Platform, capabilities: Capabilities, record_property: Record
) -> None:
    """Where the platform says that it is deterministic; in every dtype, for long and short rows."""
    device = conformance_platform.device().torch_device
    if not capabilities.deterministic:
        record_property("rejected", "deterministic")
        return
    for dtype in dtypes(capabilities):
        spec = layer(capabilities, dtype=dtype)
        backend = conformance_platform.attention(spec)
        case = Case(spec, block(capabilities), (Row(700, 1), Row(5, 1), Row(300, 40), Row(0, 90)), mode="sharp")
        first, *others = (run(backend, prepare(backend, case, capabilities, device))[0] for _ in range(4))
        assert all(torch.equal(first, other) for other in others), dtype


@pytest.mark.parametrize("mode", ["randn", "sharp"])
def test_batch_invariant(conformance_platform: Platform, capabilities: Capabilities, mode: Mode) -> None:
    """A request alone, among others, in another order and beside padding: right each time, and the same bits if so
    declared."""
    device = conformance_platform.device()
    for dtype in dtypes(capabilities):
        spec = layer(capabilities, dtype=dtype)
        backend = conformance_platform.attention(spec)
        case = Case(spec, block(capabilities), (Row(100, 1), Row(5, 1), Row(31, 1), Row(33, 20), Row(0, 47)), mode=mode)
        whole = prepare(backend, case, capabilities, device.torch_device)
        outs = request_outputs(whole, run(backend, whole)[0])
        device.synchronize()
        for order in ((0,), (3,), (4,), (2, 0, 1), (1, 4, 3), (2, 1, 0, 4, 3)):
            for padding in (0, 2):
                part = select(whole, order, padding)
                for index, out in zip(order, request_outputs(part, run(backend, part)[0]), strict=True):
                    expected = whole.expected[index]
                    ratio = float(((out.double().cpu() - expected.out).abs() / expected.bound).max())
                    assert ratio <= 1, f"request {index} in {order}: the error is {ratio:.3g} times its bound"
                    assert not capabilities.batch_invariant or torch.equal(out, outs[index]), (dtype, index, order)


def select(whole: Arena, order: tuple[int, ...], padding: int) -> Arena:
    """The step with some of its requests, in another order, and padding; the cache is shared with `whole`."""
    case, batch = whole.case, whole.batch
    rows = [case.rows[i] for i in order]
    starts = batch.query_start_host.tolist()
    picked = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order])
    index = torch.tensor(order)
    lens = batch.seq_lens_host[index]
    begins = torch.tensor([0] + [r.new for r in rows]).cumsum(0).to(torch.int32)
    where = batch.slots.device
    picked_there, index_there = picked.to(where), index.to(where)
    pad = torch.zeros(padding, dtype=torch.int64, device=where)
    step = replace(
        batch,
        query_start=begins.to(where),
        query_start_host=begins,
        seq_lens=lens.to(where),
        seq_lens_host=lens,
        block_table=batch.block_table[index_there],
        slots=torch.cat([batch.slots[picked_there], pad]),
        num_decodes=sum(r.new == 1 for r in rows),
        max_query_len=max(r.new for r in rows),
        max_seq_len=int(lens.max()),
    )
    tokens = tuple(torch.cat([x[picked_there], x[:padding]]) for x in whole.tokens)
    return replace(whole, case=replace(case, rows=tuple(rows), padding_tokens=padding), batch=step, tokens=tokens)


@pytest.mark.parametrize("mode", ["randn", "sharp"])
def test_doubled_values_double_the_output(
    conformance_platform: Platform, capabilities: Capabilities, mode: Mode
) -> None:
    """A power of two passes through every rounding but that of subnormals: ``V * 2`` gives ``O * 2`` to the bit."""
    spec, size = layer(capabilities), block(capabilities)
    backend = conformance_platform.attention(spec)
    device = conformance_platform.device().torch_device
    case = Case(spec, size, (Row(40, 1), Row(5, 1), Row(0, 50)), seed=6, mode=mode)
    once, twice = (prepare(backend, case, capabilities, device) for _ in range(2))
    change_values(twice, lambda values: values * 2)
    single, double = run(backend, once)[0], run(backend, twice)[0]
    normal = single.abs() >= torch.finfo(single.dtype).tiny
    assert normal.float().mean() > 0.9
    same_bits(capabilities, single[normal] * 2, double[normal])


def change_values(arena: Arena, change: Callable[[Tensor], Tensor]) -> None:
    """Replace all values, those in the cache and those of the step."""
    blocks = arena.batch.block_table.unique().long()
    keys, values = arena.layout.export_blocks(arena.cache, blocks)
    arena.layout.import_blocks(arena.cache, blocks, keys, change(values))
    arena.tokens = (*arena.tokens[:2], change(arena.tokens[2]))


def test_rounding_has_no_bias(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Values that are constant over the tokens come out as they are; a cast that truncates shows in the mean."""
    size, device = block(capabilities), conformance_platform.device().torch_device
    for dtype in dtypes(capabilities):
        spec = layer(capabilities, dtype=dtype)
        backend = conformance_platform.attention(spec)
        rows = (*[Row(30 + 7 * i, 1) for i in range(16)], Row(0, 100))
        arena = prepare(backend, Case(spec, size, rows), capabilities, device)
        constant = 1 + torch.rand(spec.num_kv_heads, spec.v_head_dim, generator=torch.Generator().manual_seed(0))
        constant = constant.to(device=device, dtype=spec.dtype)
        change_values(arena, lambda values, constant=constant: constant.expand_as(values).contiguous())  # type: ignore[misc]
        out, _ = run(backend, arena)
        want = constant.double().cpu().repeat_interleave(spec.num_heads // spec.num_kv_heads, 0)
        bias = float(((out.double().cpu() - want) / want).mean().abs()) / UNIT[spec.dtype]
        # In fp32 the arithmetic itself errs by more than the last rounding.
        most = 16 if dtype is torch.float32 else 0.25
        assert bias <= most, f"the mean error is {bias:.2f} units of rounding in {dtype}"


def test_chunks_give_what_the_whole_gives(
    conformance_platform: Platform, capabilities: Capabilities, scale: Scale
) -> None:
    """Prefilling a prompt in chunks, through the cache, agrees with the reference of the whole at every chunk."""
    spec, size = layer(capabilities), block(capabilities)
    backend = conformance_platform.attention(spec)

    @scale.certify(20)
    @given(st.lists(st.integers(1, 3 * size), min_size=2, max_size=5), st.integers(0, 2**31))
    def drawn(chunks: list[int], seed: int) -> None:
        computed = 0
        for chunk in chunks:
            check(conformance_platform, backend, Case(spec, size, (Row(computed, chunk),), seed=seed, mode="needle"))
            computed += chunk

    drawn()


def test_a_prompt_step_by_step(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """One cache, filled by the backend alone over steps of several sizes: what was written is read again later."""
    size, device = block(capabilities), conformance_platform.device()
    for dtype in dtypes(capabilities):
        spec = layer(capabilities, dtype=dtype)
        backend = conformance_platform.attention(spec)
        total = 3 * size + 5
        whole = prepare(backend, Case(spec, size, (Row(0, total),), mode="needle"), capabilities, device.torch_device)
        done = 0
        while done < total:
            new = min((1, size + 2, 1, 3, size - 1 or 1)[done % 5], total - done)
            step = tokens_of(whole, done, done + new)
            q, k, v = step.tokens
            out = torch.full_like(q, torch.nan)
            backend.forward(q, k, v, whole.cache, backend.plan(step.batch), out)
            error = (out.double().cpu() - whole.expected[0].out[done : done + new]).abs()
            assert (error <= whole.expected[0].bound[done : done + new]).all(), (dtype, done, new)
            done += new
        assert torch.equal(whole.buffer, whole.after)


def tokens_of(whole: Arena, begin: int, end: int) -> Arena:
    """The step of a single request's tokens ``[begin, end)``."""
    where = whole.batch.slots.device
    starts = torch.tensor([0, end - begin], dtype=torch.int32)
    lens = torch.tensor([end], dtype=torch.int32)
    batch = replace(
        whole.batch,
        query_start=starts.to(where),
        query_start_host=starts,
        seq_lens=lens.to(where),
        seq_lens_host=lens,
        slots=whole.batch.slots[begin:end],
        num_decodes=int(end - begin == 1),
        max_query_len=end - begin,
        max_seq_len=end,
    )
    return replace(whole, batch=batch, tokens=tuple(x[begin:end] for x in whole.tokens))


@pytest.mark.parametrize("feature", ["sliding_window", "chunked", "softcap", "sinks", "alibi"])
def test_a_neutral_feature_changes_nothing(
    conformance_platform: Platform, capabilities: Capabilities, feature: str, record_property: Record
) -> None:
    """A window beyond the sequence, a huge cap, sinks of minus infinity and flat slopes give the plain result."""
    if feature not in capabilities.attention:
        record_property("rejected", feature)
        return
    size = block(capabilities)
    for dtype in dtypes(capabilities):
        plain = layer(capabilities, dtype=dtype)
        device = conformance_platform.device().torch_device
        rows = (Row(100, 1), Row(5, 1), Row(33, 20), Row(0, 47))
        neutral = {
            "sliding_window": [replace(plain, window=n) for n in (101, 102, 1 << 20)],
            "chunked": [replace(plain, chunk=n) for n in (101, 1 << 20)],
            "softcap": [replace(plain, softcap=1e6)],
            "sinks": [replace(plain, sinks=True)],
            "alibi": [replace(plain, alibi=True)],
        }
        expected = prepare(
            conformance_platform.attention(plain), Case(plain, size, rows, mode="sharp"), capabilities, device
        ).expected
        for spec in neutral[feature]:
            backend = conformance_platform.attention(spec)
            arena = prepare(backend, Case(spec, size, rows, mode="sharp", neutral=True), capabilities, device)
            for out, want in zip(request_outputs(arena, run(backend, arena)[0]), expected, strict=True):
                ratio = float(((out.double().cpu() - want.out).abs() / want.bound).nan_to_num(torch.inf).max())
                assert ratio <= 1, f"{spec}: the error is {ratio:.3g} times its bound"


def test_grouped_heads_are_repeated_heads(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Sharing key/value heads gives what a layer gives that has each of them several times."""
    size, device = block(capabilities), conformance_platform.device().torch_device
    for group in (2, 3, 5, 8, 16):
        shared = layer(capabilities, group=group)
        backend = conformance_platform.attention(shared)
        arena = prepare(backend, Case(shared, size, (Row(70, 1), Row(9, 30)), mode="needle"), capabilities, device)
        spec = replace(shared, num_kv_heads=shared.num_heads)
        apart = conformance_platform.attention(spec)
        layout = apart.layout(size)
        num_blocks = int(arena.batch.block_table.max()) + 1
        _, _, _, cache = bind(layout, num_blocks, 0, device)
        blocks = torch.arange(num_blocks, device=device)
        held = (x.repeat_interleave(group, 2).contiguous() for x in arena.layout.export_blocks(arena.cache, blocks))
        layout.import_blocks(cache, blocks, *held)
        q, k, v = arena.tokens
        out = torch.full_like(q, torch.nan)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        apart.forward(q, k, v, cache, apart.plan(arena.batch), out)
        for got in (out, run(backend, arena)[0]):
            for mine, want in zip(request_outputs(arena, got), arena.expected, strict=True):
                ratio = float(((mine.double().cpu() - want.out).abs() / want.bound).nan_to_num(torch.inf).max())
                assert ratio <= 1, f"group of {group}: the error is {ratio:.3g} times its bound"


def test_requests_share_a_block_of_the_step(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Keys and values of the whole step are written before any request attends: a prefix may come with the step."""
    size = block(capabilities)
    for dtype in dtypes(capabilities):
        spec = layer(capabilities, dtype=dtype)
        backend = conformance_platform.attention(spec)
        for rows in (
            (Row(2 * size, 1, shares=2), Row(size, 1, shares=2), Row(0, 2 * size + 3)),
            (Row(0, 2 * size), Row(2 * size, 7, shares=0), Row(size, size + 3, shares=0)),
            (Row(2 * size - 1, 1), Row(2 * size, 1, shares=0), Row(2 * size, 5, shares=0)),
        ):
            for seed in range(2):
                check(conformance_platform, backend, Case(spec, size, rows, seed=seed, mode="sharp"))
