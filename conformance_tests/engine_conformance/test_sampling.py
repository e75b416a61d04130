"""L1: drawing tokens, penalties and log probabilities: exact where the contract says so, from its words in integers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine_conformance.cases import Scale, dtypes
from engine_sdk import REFERENCE_OPS, Capabilities, DrawInputs, OpSet, Platform

# c of ``2**-f = 1 - f * (c1 - f * (c2 - ...))``, times 2**31: what the rule of `engine_sdk.sampling` is made of.
_HALVING = (1488514808, 515782941, 118750211, 19769350, 2029187)


def weight_of(level: int) -> int:
    """``2**(40 - level / 2**16)``, rounded as the rule says."""
    octaves, fraction = divmod(level, DrawInputs.LEVELS)
    made = _HALVING[-1]
    for coefficient in (*_HALVING[-2::-1], 1 << 31):
        made = coefficient - (made * fraction >> 16)
    return ((made + (1 << 6)) >> 7) << 16 >> octaves


def drawn_token(logits: Tensor, top_k: int, top_p: int, cut: int, u: int, scale: float) -> int:
    """The rule for one row, in whole numbers."""
    x = logits.float().numpy()
    if np.isnan(x).any():
        return int(np.isnan(x).argmax())
    best = x.max()
    if top_k == 1 or not np.isfinite(best):
        return int(x.argmax())
    with np.errstate(over="ignore"):
        scaled = (best - x).astype(np.float32) * np.float32(scale)
    levels = [int(min(value, DrawInputs.LAST)) for value in scaled.astype(np.float32).tolist()]
    kth = sorted(x.tolist(), reverse=True)[min(top_k, len(x)) - 1]
    weights = [
        weight_of(level) if level <= cut and value >= kth else 0
        for level, value in zip(levels, x.tolist(), strict=True)
    ]
    if top_p < DrawInputs.ONE:
        need, mass, last = max(1, _share(sum(weights), top_p)), 0, 0
        for last in sorted({level for level, weight in zip(levels, weights, strict=True) if weight}):
            mass += sum(w for level, w in zip(levels, weights, strict=True) if level == last)
            if mass >= need:
                break
        weights = [weight if level <= last else 0 for level, weight in zip(levels, weights, strict=True)]
    target, mass = _share(sum(weights), u), 0
    for token, weight in enumerate(weights):
        mass += weight
        if mass > target:
            return token
    raise AssertionError("no token weighs anything")


def _share(total: int, fraction: int) -> int:
    return (total >> 31) * fraction + ((total & (DrawInputs.ONE - 1)) * fraction >> 31)


def draw_inputs(rows: list[tuple[int, int, int, int, float]], vocab: int, device: torch.device) -> DrawInputs:
    """Rows of (top_k, top_p, cut, u, scale) as the platform's operation takes them."""
    top_k, top_p, cut, u, scale = zip(*rows, strict=True)
    values: dict[str, Any] = {
        "top_k": torch.tensor(top_k, device=device),
        "top_p": torch.tensor(top_p, device=device),
        "cut": torch.tensor(cut, device=device),
        "u": torch.tensor(u, device=device),
        "scale": torch.tensor(scale, dtype=torch.float32, device=device),
        "max_top_k": max((k for k in top_k if 1 < k < vocab), default=0),
        "any_top_p": any(p < DrawInputs.ONE for p in top_p),
        "any_min_p": any(c < DrawInputs.LAST for c in cut),
    }
    return DrawInputs(**{field.name: values[field.name] for field in dataclasses.fields(DrawInputs)})


LOG2E = 1.4426950408889634
_ONE, LAST = DrawInputs.ONE, DrawInputs.LAST


@st.composite
def sampling_rows(draw: st.DrawFn, vocab: int) -> tuple[int, int, int, int, float]:
    """One row's parameters, ends of the ranges included."""
    temperature = draw(st.sampled_from((1e-6, 0.1, 0.7, 1.0, 1.5, 100.0)))
    return (
        draw(st.sampled_from((1, 2, 5, vocab - 1, vocab, vocab))),
        draw(st.sampled_from((1, _ONE // 10, _ONE // 2, int(0.9 * _ONE), _ONE - 1, _ONE, _ONE))),
        draw(st.sampled_from((0, DrawInputs.LEVELS, 5 * DrawInputs.LEVELS // 2, DrawInputs.LAST, DrawInputs.LAST))),
        draw(st.one_of(st.sampled_from((0, _ONE - 1, _ONE // 2)), st.integers(0, _ONE - 1))),
        LOG2E / temperature * DrawInputs.LEVELS,
    )


def logits_of(kind: str, vocab: int, generator: torch.Generator) -> Tensor:
    """A row of logits, some of them no distribution."""
    x = torch.randn(vocab, generator=generator) * 3
    match kind:
        case "ties":
            return x.round()
        case "equal":
            return torch.zeros(vocab)
        case "masked":
            return x.masked_fill(torch.rand(vocab, generator=generator) < 0.7, -torch.inf).index_fill(
                0, torch.randint(vocab, (1,), generator=generator), 1.0
            )
        case "all masked":
            return torch.full((vocab,), -torch.inf)
        case "nan":
            return x.index_fill(0, torch.randint(vocab, (2,), generator=generator), torch.nan)
        case "infinite":
            return x.index_fill(0, torch.randint(vocab, (2,), generator=generator), torch.inf)
        case "huge":
            return x * 1e3
    return x


_KINDS = ("randn", "randn", "ties", "equal", "masked", "all masked", "nan", "infinite", "huge")


def test_draw(conformance_platform: Platform, capabilities: Capabilities, scale: Scale) -> None:
    """Rows of every kind together, each with parameters of its own, give the tokens of the rule, exactly."""
    device, ops = conformance_platform.device().torch_device, conformance_platform.ops()

    @scale.certify(40)
    @given(
        st.sampled_from((2, 7, 64, 515, 1500)),
        st.sampled_from(dtypes(capabilities)),
        st.integers(0, 2**31),
        st.data(),
    )
    def drawn(vocab: int, dtype: torch.dtype, seed: int, data: st.DataObject) -> None:
        generator = torch.Generator().manual_seed(seed)
        kinds = data.draw(st.lists(st.sampled_from(_KINDS), min_size=1, max_size=6))
        logits = torch.stack([logits_of(kind, vocab, generator) for kind in kinds]).to(dtype)
        rows = [data.draw(sampling_rows(vocab)) for _ in kinds]
        there = logits.to(device)
        got = ops.draw(there, draw_inputs(rows, vocab, device))
        assert (got.dtype, got.shape) == (torch.int64, (len(rows),))
        assert torch.equal(there.cpu().view(torch.uint8), logits.view(torch.uint8)), "the logits were changed"
        want = [drawn_token(x, *row) for x, row in zip(logits, rows, strict=True)]
        assert got.tolist() == want, (kinds, rows)

    drawn()


def test_draw_from_a_large_vocabulary(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """As the reference does it, for the sizes that models have, and for more rows than go at once."""
    device, ops = conformance_platform.device().torch_device, conformance_platform.ops()
    for dtype in dtypes(capabilities):
        for vocab, count in ((50_257, 6), (130_000, 2), (300, 150)):
            generator = torch.Generator().manual_seed(vocab)
            logits = (torch.randn(count, vocab, generator=generator) * 4).to(dtype)
            units = torch.randint(0, _ONE, (count,), generator=generator).tolist()
            choices = ((vocab, _ONE), (50, _ONE), (vocab, int(0.9 * _ONE)), (1000, _ONE // 2), (1, _ONE))
            rows = [
                (
                    min(vocab, choices[i % 5][0]),
                    choices[i % 5][1],
                    DrawInputs.LAST if i % 3 else 4 << 16,
                    unit,
                    LOG2E * DrawInputs.LEVELS,
                )
                for i, unit in enumerate(units)
            ]
            got = ops.draw(logits.to(device), draw_inputs(rows, vocab, device))
            want = REFERENCE_OPS.draw(logits, draw_inputs(rows, vocab, torch.device("cpu")))
            assert torch.equal(got.cpu(), want), (dtype, vocab)


@pytest.mark.parametrize("count", [1, 2, 65, 300])
def test_draw_does_not_see_the_batch(conformance_platform: Platform, count: int) -> None:
    """Each row has its own number and its own filters, wherever it is and whoever is beside it."""
    device, ops, vocab = conformance_platform.device().torch_device, conformance_platform.ops(), 777
    kinds = (
        (vocab, _ONE, LAST),
        (7, _ONE, LAST),
        (vocab, _ONE * 4 // 5, LAST),
        (40, _ONE // 2, 6 << 16),
        (1, _ONE, LAST),
    )
    rows = [(*kinds[i % 5], i * 1_000_003 % _ONE, LOG2E * DrawInputs.LEVELS) for i in range(count)]
    logits = logits_of("ties", count * vocab, torch.Generator().manual_seed(3)).view(count, vocab)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))

    def drawn(at: Tensor) -> list[int]:
        made = draw_inputs([rows[i] for i in at.tolist()], vocab, device)
        return ops.draw(logits[at].to(device), made).tolist()

    want = [drawn_token(x, *row) for x, row in zip(logits, rows, strict=True)]
    assert drawn(torch.arange(count)) == want
    assert drawn(order) == [want[i] for i in order.tolist()]
    assert drawn(order[-1:]) == [want[int(order[-1])]]


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor | None:
    """What each token [V] is drawn with, in fp64; None if rounding may decide whether a token is kept."""
    x = logits.double()
    p = ((x - x.max()) / temperature).exp()
    sharp = not 0 < min_p < 1 or bool(((p - min_p).abs() > 1e-4).all())
    p = p.where((p >= min_p) & (x >= x.sort(descending=True).values[top_k - 1]), 0.0)
    p /= p.sum()
    above = torch.stack([p[x > value].sum() for value in x])  # the mass of what is likelier
    sharp &= top_p == 1 or bool(((above - top_p).abs() > 1e-4).all())
    p = p.where(above < top_p, 0.0)
    return p / p.sum() if sharp else None


def row_of(temperature: float, top_k: int, top_p: float, min_p: float, unit: int) -> tuple[int, int, int, int, float]:
    """A row of `draw_inputs`."""
    cut = min(int(-math.log2(min_p) * DrawInputs.LEVELS), LAST) if min_p else LAST
    return top_k, round(top_p * _ONE), cut, unit, LOG2E / temperature * DrawInputs.LEVELS


def test_draw_shares(conformance_platform: Platform, scale: Scale) -> None:
    """Of 512 evenly spaced numbers each token gets its part, to two: what filters keep, they keep in proportion."""
    device, ops, count = conformance_platform.device().torch_device, conformance_platform.ops(), 512

    @scale.certify(30)
    @given(
        st.lists(st.integers(-20, 20), min_size=1, max_size=24),
        st.sampled_from((0.3, 0.7, 1.0, 2.5)),
        st.integers(2, 24),
        st.sampled_from((1.0, 1.0, 1e-6, 0.31, 0.9, 0.999)),
        st.sampled_from((0.0, 0.0, 0.05, 0.5, 1.0)),
    )
    def shares(quarters: list[int], temperature: float, top_k: int, top_p: float, min_p: float) -> None:
        x = torch.tensor(quarters) / 4.0
        top_k = min(top_k, len(x))
        want = probabilities(x, temperature, top_k, top_p, min_p)
        if want is None or top_k == 1:
            return
        rows = [row_of(temperature, top_k, top_p, min_p, i * (_ONE // count)) for i in range(count)]
        got = ops.draw(x.expand(count, -1).contiguous().to(device), draw_inputs(rows, len(x), device)).cpu()
        found = got.bincount(minlength=len(x)) / count
        assert float((found - want).abs().max()) < 2 / count
        assert not found[want == 0].any(), "a token was drawn that no filter keeps"

    shares()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 60, 1.0, 0.0),
        (0.5, 60, 1.0, 0.0),
        (1.0, 7, 1.0, 0.0),
        (1.0, 60, 0.7, 0.0),
        (1.0, 60, 1.0, 0.1),
        (1.7, 20, 0.8, 0.0),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p", "all"],
)
def test_draws_spread_as_they_should(
    conformance_platform: Platform, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """By a G-test at 1e-6, of a second and larger sample where the first one is suspicious."""
    device, ops, vocab = conformance_platform.device().torch_device, conformance_platform.ops(), 60
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(8)) * 2
    want = probabilities(logits, temperature, top_k, top_p, min_p)
    assert want is not None
    for count, enough in ((4000, 1e-2), (40_000, 1e-6)):
        units = torch.randint(0, _ONE, (count,), generator=torch.Generator().manual_seed(count)).tolist()
        rows = [row_of(temperature, top_k, top_p, min_p, unit) for unit in units]
        got = ops.draw(logits.expand(count, vocab).contiguous().to(device), draw_inputs(rows, vocab, device)).cpu()
        if (likely := g_test(got.bincount(minlength=vocab), want)) > enough:
            return
    raise AssertionError(f"a fit as bad as this one has a probability of {likely:.2g}")


def g_test(observed: Tensor, p: Tensor) -> float:
    """The probability of a fit as bad as this one."""
    assert not observed[p == 0].any(), "a token was drawn that no filter keeps"
    some, count = observed > 0, observed.sum()
    g = 2 * (observed[some] * (observed[some] / (p[some] * count)).log()).sum().clamp(min=0)
    return float(torch.special.gammaincc(((p > 0).sum() - 1).double() / 2, g.double() / 2))


@pytest.mark.parametrize("kind", sorted(set(_KINDS)))
def test_greedy(conformance_platform: Platform, capabilities: Capabilities, kind: str) -> None:
    """The first of the largest logits, and the first NaN before all; a row of nothing but -inf gives a token too."""
    device, ops = conformance_platform.device().torch_device, conformance_platform.ops()
    for dtype in dtypes(capabilities):
        for vocab in (5, 515, 50_257):
            generator = torch.Generator().manual_seed(vocab)
            logits = torch.stack([logits_of(kind, vocab, generator) for _ in range(5)]).to(dtype)
            got = ops.draw(logits.to(device), None)
            for row, token in zip(logits.float(), got.tolist(), strict=True):
                nan = row.isnan().nonzero().flatten()
                assert token == (int(nan[0]) if len(nan) else int((row == row.max()).nonzero()[0])), (dtype, vocab)


def test_penalise(conformance_platform: Platform) -> None:
    """Repetition on prompt and output, then frequency and presence on the output; bans; other rows stay."""
    device, ops, vocab = conformance_platform.device().torch_device, conformance_platform.ops(), 700
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, vocab, generator=generator) * 3
    logits[2, :50] = -torch.inf
    counts = torch.randint(0, 4, (5, vocab), generator=generator) * (torch.rand(5, vocab, generator=generator) < 0.3)
    prompt = torch.rand(5, vocab, generator=generator) < 0.2
    banned = torch.rand(5, vocab, generator=generator) < 0.3
    banned[1] = False
    history = torch.where(prompt, counts + OpSet.PROMPT, counts).to(torch.int32)
    history = torch.where(banned, history + OpSet.BANNED, history).to(torch.int32)
    places = torch.tensor([[5, 0, 2, 3], [1, 4, 0, 2]])  # rows of the logits, slots
    penalties = torch.tensor([[1.3, 1.0, 0.8, 1.0], [0.5, 0.0, -0.7, 1.1], [0.2, 0.0, 0.9, -0.4]])
    want = logits.double()
    for (row, slot), (repetition, frequency, presence) in zip(places.T.tolist(), penalties.T.double(), strict=True):
        seen = (counts[slot] > 0) | prompt[slot]
        x = want[row]
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        x = x - frequency * counts[slot] - presence * (counts[slot] > 0)
        want[row] = x.masked_fill(banned[slot], -torch.inf)
    got, held = logits.to(device), history.to(device)
    given = held, places.to(device), penalties.to(device)
    ops.penalise(got, *given)
    for before, after in zip((history, places, penalties), given, strict=True):
        assert torch.equal(before, after.cpu()), "an input was changed"
    untouched = [row for row in range(7) if row not in places[0].tolist()]
    assert torch.equal(got.cpu()[untouched], logits[untouched]), "a row without penalties was changed"
    torch.testing.assert_close(got.cpu().double(), want, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("num", [0, 1, 5, 300])
def test_logprobs(conformance_platform: Platform, capabilities: Capabilities, num: int) -> None:
    """Of the token and of the likeliest, in order, with ranks; far from the best ones too."""
    device, ops, vocab = conformance_platform.device().torch_device, conformance_platform.ops(), 300
    for dtype in dtypes(capabilities):
        generator = torch.Generator().manual_seed(num)
        logits = torch.stack(
            [logits_of(kind, vocab, generator) for kind in ("randn", "ties", "equal", "masked", "huge")]
        )
        logits = logits.to(dtype)
        token_ids = torch.randint(vocab, (5,), generator=generator)
        token_ids[0] = logits[0].argmax()
        there = logits.to(device)
        packed = ops.logprobs(there, token_ids.to(device), num).cpu()
        assert (packed.dtype, packed.shape) == (torch.int32, (5, 2 * num + 3))
        assert torch.equal(there.cpu(), logits), "the logits were changed"
        ids, values, ranks = (
            packed[:, : num + 1].long(),
            packed[:, num + 1 : -1].contiguous().view(torch.float32),
            packed[:, -1],
        )
        exact = logits.double().log_softmax(-1)
        assert torch.equal(ids[:, 0], token_ids)
        torch.testing.assert_close(values.double(), exact.gather(1, ids), rtol=2e-6, atol=2e-5)
        assert torch.equal(ranks, (logits > logits.gather(1, token_ids[:, None])).sum(1).int() + 1)
        best = logits.sort(-1, descending=True).values[:, :num]
        assert torch.equal(logits.gather(1, ids[:, 1:]), best), "not the likeliest, or not in order"
        for row in ids[:, 1:].tolist():
            assert len(set(row)) == num, "a token is listed twice"
