"""Cases of paged attention, drawn as metadata and a seed; `engine_conformance.arena` makes them concrete."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from engine_conformance import seeds
from engine_sdk import ATTENTION_FEATURES, AttentionSpec, Capabilities, Domain

Mode = Literal["randn", "sharp", "large", "sunk", "flat", "needle"]
Memory = Literal["dense", "fused", "transposed"]

FLOATS8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
"""What 8 bits of a cache may be: OCP's formats, and those without infinity and negative zero."""

_NAMES8 = [str(dtype).removeprefix("torch.") for dtype in FLOATS8]
of_8_bits = pytest.mark.parametrize(
    "kv_dtype",
    [
        pytest.param(dtype, marks=pytest.mark.conformance(capability=f"kv_dtypes.{name}"), id=name)
        for dtype, name in zip(FLOATS8, _NAMES8, strict=True)
    ],
)
"""Marks a case of each of them: passed where it is declared, refused where it is not."""

COMBINED = "combined"
"""The name of a layer that has several of the declared features at once."""


@dataclass(frozen=True)
class Scale:
    """What a profile may spend.

    Attributes:
        examples: how many times the examples of a smoke run are drawn.
        max_tokens: most tokens of a request, where blocks are not larger; None for no limit.
        max_head_dim: largest head size; None for no limit.
    """

    examples: float = 1
    max_tokens: int | None = None
    max_head_dim: int | None = None

    def certify(self, smoke: int) -> settings:
        """Hypothesis settings of a case that draws `smoke` examples in a smoke run: the same everywhere, repeatable."""
        return settings(
            derandomize=seeds.is_fixed(),
            deadline=None,
            database=None,
            max_examples=max(1, round(smoke * self.examples)),
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )

    def tokens(self, wanted: int, block_size: int = 1) -> int:
        """`wanted` tokens, or as many as the profile allows; a request may always reach into its second block."""
        return wanted if self.max_tokens is None else min(wanted, max(self.max_tokens, block_size + 1))


SCALES = {
    "smoke": Scale(),
    "ci": Scale(8),
    "cert": Scale(50),
    "sim": Scale(0.1, max_tokens=64, max_head_dim=64),
}
"""Of each profile."""


@dataclass(frozen=True)
class Row:
    """A request: `computed` tokens lie in the cache, `new` ones come with the step.

    `shares` is the index of another row, which shares nothing itself: the full blocks that both have within this row's
    computed tokens are that row's, even where it writes them in this very step.
    """

    computed: int
    new: int
    shares: int | None = None

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
        mode: how values are drawn. ``"sharp"`` and ``"large"`` have large scores, ``"sunk"`` only very negative ones,
            ``"flat"`` nearly equal ones and values of one sign, and ``"needle"`` plants keys at the edges of the mask.
        seed: of the values and of the block table.
        padding: bytes after each block, in units of 256.
        spare_blocks: blocks of the pool that no request owns, at least.
        padding_tokens: tokens after the last request's, which belong to none.
        empty_rows: requests of length 0 with one token, among the decodes.
        idle_rows: requests of length 0 without a token, after all others.
        reads: keys and values are in the cache already and none come with the step.
        memory: whether q, k and v are dense, slices of one tensor, or views of head-major ones.
        lse: ask for the log-sum-exp.
        neutral: sinks are minus infinity and ALiBi's slopes 0, so that they change nothing.
        num_blocks, width: of the pool and of the block table, at least.
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
    idle_rows: int = 0
    reads: bool = False
    memory: Memory = "dense"
    lse: bool = False
    neutral: bool = False
    num_blocks: int = 0
    width: int = 0

    @property
    def num_decodes(self) -> int:
        """Requests of `rows` with one new token."""
        return sum(row.new == 1 for row in self.rows)


def members(domain: Domain, preferred: Iterable[int], count: int = 3) -> list[int]:
    """Some values of a domain: the preferred ones that it has, else its smallest."""
    if found := [value for value in preferred if value in domain]:
        return found
    if domain.values is not None:
        return sorted(domain.values)[:count]
    return [domain.low + i * domain.step for i in range(count) if domain.low + i * domain.step in domain]


def bounds(domain: Domain, most: int) -> list[int]:
    """The least and the greatest values of a domain, those above `most` left out where smaller ones are there."""
    if domain.values is not None:
        values = sorted(domain.values)
    else:
        high = most if domain.high is None else min(most, domain.high)
        values = [domain.low, domain.low + (max(0, high - domain.low) // domain.step) * domain.step]
    return [v for v in (values[0], values[-1]) if v <= most] or values[:1]


def layer(
    declared: Capabilities, *, group: int = 4, head_dim: int | None = None, dtype: torch.dtype | None = None
) -> AttentionSpec:
    """A plain layer within what is declared, of two key/value heads; in 16 bits unless `dtype` says otherwise."""
    size = head_dim or members(declared.head_dims, (64,))[0]
    dtype = dtype or (torch.bfloat16 if torch.bfloat16 in declared.dtypes else torch.float16)
    return AttentionSpec(2 * group, 2, size, size, size**-0.5, dtype, dtype)


def block(declared: Capabilities) -> int:
    """A block size within what is declared."""
    return members(declared.block_sizes, (16,))[0]


def dtypes(declared: Capabilities) -> list[torch.dtype]:
    """The declared dtypes of activations, in a fixed order."""
    return sorted(declared.dtypes, key=str)


@st.composite
def lengths(draw: st.DrawFn, scale: Scale, block_size: int, most: int = 6) -> int:
    """A length around the boundaries of blocks."""
    near = draw(st.integers(1, most)) * block_size
    choices = (1, 2, block_size - 1, block_size, block_size + 1, near - 1, near, near + 1, draw(st.integers(1, near)))
    return scale.tokens(max(1, draw(st.sampled_from(choices))), block_size)


@st.composite
def batches(draw: st.DrawFn, scale: Scale, block_size: int) -> tuple[Row, ...]:
    """Decodes, then chunks after a prefix, and whole prompts; some begin with another's blocks."""
    near = lengths(scale, block_size, 3)
    decodes = [Row(draw(lengths(scale, block_size)) - 1, 1) for _ in range(draw(st.integers(0, 5)))]
    others = []
    for _ in range(draw(st.integers(0 if decodes else 1, 3))):
        new = max(2, draw(near))
        others.append(Row(draw(st.sampled_from((0, draw(near)))), new))
    rows = [*decodes, *others]
    if len(rows) > 1 and draw(st.booleans()):
        owner, borrower = draw(st.permutations(range(len(rows))))[:2]
        rows[borrower] = replace(rows[borrower], shares=owner)
    return tuple(rows)


@st.composite
def specs(draw: st.DrawFn, declared: Capabilities, feature: str, block_size: int, scale: Scale) -> AttentionSpec:
    """A layer of one feature (``"causal"`` for none), or of several, within what is declared otherwise."""
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from((1, 4, 7, 8)))
    sizes = [n for n in members(declared.head_dims, (16, 64, 80, 128)) if n <= (scale.max_head_dim or n)]
    head_dim = draw(st.sampled_from(sizes or members(declared.head_dims, ())[:1]))
    dtype = draw(st.sampled_from(dtypes(declared)))
    spec = AttentionSpec(
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        scale=draw(st.sampled_from((head_dim**-0.5, 0.05, 0.2))),
        dtype=dtype,
        kv_dtype=dtype,
    )
    wanted: list[str] = [feature]
    if feature == COMBINED:
        choices: list[str] = [*sorted(declared.attention)] or ["causal"]
        wanted = draw(st.lists(st.sampled_from(choices), max_size=4, unique=True))
    for name in wanted:
        spec = _with(spec, name, draw, block_size, declared)
    return spec


def _with(spec: AttentionSpec, feature: str, draw: st.DrawFn, block_size: int, declared: Capabilities) -> AttentionSpec:
    near = [max(1, n) for n in (1, block_size - 1, block_size, block_size + 1, 3 * block_size)]
    local = spec.window is not None or spec.chunk is not None or not spec.causal
    match feature:
        case "sliding_window" if not local:
            return replace(spec, window=draw(st.sampled_from(near)))
        case "chunked" if not local:
            return replace(spec, chunk=draw(st.sampled_from(near)))
        case "softcap":
            return replace(spec, softcap=draw(st.sampled_from((0.5, 5.0, 30.0))))
        case "sinks":
            return replace(spec, sinks=True)
        case "alibi" if spec.relative is None:
            return replace(spec, alibi=True)
        case "v_head_dim":
            return replace(spec, v_head_dim=draw(st.sampled_from(members(declared.v_head_dims, (8, 48, 72)))))
        case "bidirectional" if not local:
            return replace(spec, causal=False)
        case "relative_bias" if not local and not spec.alibi:
            return replace(spec, causal=False, relative=draw(st.sampled_from(near)))
        case "two_sided_window" if not local:
            return replace(spec, causal=False, window=draw(st.sampled_from(near)))
    return spec


@st.composite
def cases(draw: st.DrawFn, declared: Capabilities, feature: str = "causal", scale: Scale = SCALES["smoke"]) -> Case:
    """A batch of one feature, in a pool of random order."""
    assert feature in {"causal", COMBINED, *ATTENTION_FEATURES}, feature
    block_size = draw(st.sampled_from(members(declared.block_sizes, (8, 16, 32))))
    rows = draw(batches(scale, block_size))
    lse = feature == "lse" or (feature == COMBINED and "lse" in declared.attention and draw(st.booleans()))
    return Case(
        spec=draw(specs(declared, feature, block_size, scale)),
        block_size=block_size,
        rows=rows,
        mode=draw(st.sampled_from(("randn", "sharp", "large", "sunk", "flat", "needle", "needle"))),
        seed=draw(st.integers(0, 2**31)),
        padding=draw(st.integers(0, 2)),
        spare_blocks=draw(st.sampled_from((1, 7, 400))),
        padding_tokens=draw(st.sampled_from((0, 0, 3))),
        empty_rows=draw(st.sampled_from((0, 0, 2))),
        idle_rows=draw(st.sampled_from((0, 0, 2))),
        reads=draw(st.sampled_from((False, False, False, True))),
        memory=draw(st.sampled_from(("dense", "fused", "transposed"))),
        lse=lse,
    )
