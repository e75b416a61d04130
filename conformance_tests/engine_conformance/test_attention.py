"""L2: paged attention against the reference, in pools where every byte that must not matter is poison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_conformance.cases import Arena, Case, Mode, Row, cases, certify, check, members, prepare, run
from engine_conformance.reference import UNIT
from engine_sdk import AttentionSpec, Capabilities, Platform, UnsupportedCapability

FEATURES = ("sliding_window", "chunked", "softcap", "sinks", "alibi", "v_head_dim", "bidirectional", "lse")

Record = Callable[[str, object], None]


def layer(declared: Capabilities, *, group: int = 4, head_dim: int | None = None) -> AttentionSpec:
    """A plain layer within what is declared."""
    size = head_dim or members(declared.head_dims, (64,))[0]
    dtype = torch.bfloat16 if torch.bfloat16 in declared.dtypes else torch.float16
    return AttentionSpec(2 * group, 2, size, size, size**-0.5, dtype, dtype)


def block(declared: Capabilities) -> int:
    """A block size within what is declared."""
    return members(declared.block_sizes, (16,))[0]


@pytest.mark.parametrize("feature", ["causal", *FEATURES])
def test_agrees_with_reference(
    conformance_platform: Platform,
    capabilities: Capabilities,
    feature: str,
    examples: int,
    record_property: Record,
) -> None:
    """Mixed batches with each feature; one that is not declared is refused before anything runs."""
    worst: dict[torch.dtype, float] = {}

    @certify((120 if feature == "causal" else 40) * examples)
    @given(cases(capabilities, feature))
    def drawn(case: Case) -> None:
        ratio = check(conformance_platform, conformance_platform.attention(case.spec), case)
        worst[case.spec.dtype] = max(worst.get(case.spec.dtype, 0.0), ratio)

    if feature == "causal" or feature in capabilities.attention:
        drawn()
        for dtype, ratio in worst.items():
            record_property(f"error over bound: attention, {str(dtype).removeprefix('torch.')}", ratio)
    else:
        refuses(conformance_platform, capabilities, feature)


def refuses(platform: Platform, declared: Capabilities, feature: str) -> None:
    """Asking for an undeclared feature raises `UnsupportedCapability`, and a plain case still runs."""
    spec = layer(declared)
    plain = Case(spec, block(declared), (Row(3, 1),))
    asked = {
        "sliding_window": replace(spec, window=8),
        "chunked": replace(spec, chunk=8),
        "softcap": replace(spec, softcap=5.0),
        "sinks": replace(spec, sinks=True),
        "alibi": replace(spec, alibi=True),
        "v_head_dim": replace(spec, v_head_dim=spec.head_dim // 2),
        "bidirectional": replace(spec, causal=False),
    }
    with pytest.raises(UnsupportedCapability):
        check(platform, platform.attention(asked.get(feature, spec)), replace(plain, lse=feature == "lse"))
    check(platform, platform.attention(spec), plain)


def test_refuses_what_is_not_declared(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Just outside the head sizes, block sizes and dtypes, there is a typed refusal."""
    spec = layer(capabilities)
    if (size := capabilities.head_dims.outside()) is not None:
        with pytest.raises(UnsupportedCapability):
            conformance_platform.attention(replace(spec, head_dim=size, v_head_dim=size))
    if (size := capabilities.block_sizes.outside()) is not None:
        with pytest.raises(UnsupportedCapability):
            conformance_platform.attention(spec).layout(size)
    for dtype in {torch.float64, torch.float8_e4m3fn} - capabilities.dtypes:
        with pytest.raises(UnsupportedCapability):
            conformance_platform.attention(replace(spec, dtype=dtype))
    for dtype in {torch.float8_e4m3fn, torch.int8} - capabilities.kv_dtypes:
        with pytest.raises(UnsupportedCapability):
            conformance_platform.attention(replace(spec, kv_dtype=dtype))
    check(conformance_platform, conformance_platform.attention(spec), Case(spec, block(capabilities), (Row(3, 1),)))


def test_kv_dtypes(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Every declared pair of activation and cache dtypes."""
    rows = (Row(20, 1), Row(5, 9), Row(0, 17))
    for dtype in capabilities.dtypes:
        for kv_dtype in capabilities.kv_dtypes:
            spec = replace(layer(capabilities), dtype=dtype, kv_dtype=kv_dtype)
            check(conformance_platform, conformance_platform.attention(spec), Case(spec, block(capabilities), rows))


def test_long_rows(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Sequences long enough to be split, beside short ones."""
    rows = (Row(0, 1), Row(4000, 1), Row(17, 1), Row(2500, 300), Row(0, 1700))
    for mode in ("sharp", "needle"):
        spec = layer(capabilities)
        check(
            conformance_platform, conformance_platform.attention(spec), Case(spec, block(capabilities), rows, mode=mode)
        )


def test_many_rows(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """A large batch of decodes of all lengths: none borrows another's length or table."""
    spec = layer(capabilities, group=1)
    rows = tuple(Row(11 * i % 230, 1) for i in range(96))
    check(
        conformance_platform, conformance_platform.attention(spec), Case(spec, block(capabilities), rows, mode="needle")
    )


def test_block_ids_are_wide(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Block ids beyond 16 bits."""
    size = min(capabilities.head_dims.values or {16}, default=16)
    spec = replace(
        layer(capabilities, group=1, head_dim=members(capabilities.head_dims, (size,))[0]), num_heads=1, num_kv_heads=1
    )
    case = Case(spec, block(capabilities), (Row(100, 1), Row(30, 20)), spare_blocks=70_000)
    check(conformance_platform, conformance_platform.attention(spec), case)


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
    assert torch.equal(run(backend, first)[0], outs[0])


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


def same_bits(declared: Capabilities, a: torch.Tensor, b: torch.Tensor) -> None:
    """Assert equal bits, or equal values but for rounding where the platform says that it is not deterministic."""
    if declared.deterministic:
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["randn", "sharp"])
def test_doubled_values_double_the_output(
    conformance_platform: Platform, capabilities: Capabilities, mode: Mode
) -> None:
    """A power of two passes through every rounding: ``V * 2`` gives ``O * 2`` to the bit."""
    spec, size = layer(capabilities), block(capabilities)
    backend = conformance_platform.attention(spec)
    device = conformance_platform.device().torch_device
    case = Case(spec, size, (Row(40, 1), Row(5, 1), Row(0, 50)), seed=6, mode=mode)
    once, twice = (prepare(backend, case, capabilities, device) for _ in range(2))
    change_values(twice, lambda values: values * 2)
    same_bits(capabilities, run(backend, once)[0] * 2, run(backend, twice)[0])


def change_values(arena: Arena, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace all values, those in the cache and those of the step."""
    blocks = arena.batch.block_table.unique().long()
    keys, values = arena.layout.export_blocks(arena.cache, blocks)
    arena.layout.import_blocks(arena.cache, blocks, keys, change(values))
    arena.tokens = (*arena.tokens[:2], change(arena.tokens[2]))


def test_rounding_has_no_bias(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Values that are constant over the tokens come out as they are; a cast that truncates shows in the mean."""
    spec, size = layer(capabilities), block(capabilities)
    backend = conformance_platform.attention(spec)
    device = conformance_platform.device().torch_device
    rows = (*[Row(30 + 7 * i, 1) for i in range(16)], Row(0, 100))
    arena = prepare(backend, Case(spec, size, rows), capabilities, device)
    constant = 1 + torch.rand(spec.num_kv_heads, spec.v_head_dim, generator=torch.Generator().manual_seed(0))
    constant = constant.to(device=device, dtype=spec.dtype)
    change_values(arena, lambda values: constant.expand_as(values).contiguous())
    out, _ = run(backend, arena)
    want = constant.double().repeat_interleave(spec.num_heads // spec.num_kv_heads, 0)
    bias = float(((out.double() - want) / want).mean().abs()) / UNIT[spec.dtype]
    assert bias <= 0.25, f"the mean error is {bias:.2f} units of rounding"


def test_chunks_give_what_the_whole_gives(
    conformance_platform: Platform, capabilities: Capabilities, examples: int
) -> None:
    """Prefilling a prompt in chunks, through the cache, agrees with the reference of the whole at every chunk."""
    spec, size = layer(capabilities), block(capabilities)
    backend = conformance_platform.attention(spec)

    @certify(10 * examples)
    @given(st.lists(st.integers(1, 3 * size), min_size=2, max_size=5), st.integers(0, 2**31))
    def drawn(chunks: list[int], seed: int) -> None:
        computed = 0
        for chunk in chunks:
            check(conformance_platform, backend, Case(spec, size, (Row(computed, chunk),), seed=seed))
            computed += chunk

    drawn()
