"""L1: token-wise operations and experts against fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine_conformance.cases import certify
from engine_conformance.reference import FP32, TINY, UNIT, excess
from engine_sdk import Capabilities, ExpertsSpec, ExpertWeights, Platform, QuantScheme, UnsupportedCapability


def dtypes(declared: Capabilities) -> list[torch.dtype]:
    """The declared dtypes, in a fixed order."""
    return sorted(declared.dtypes, key=str)


def close(got: Tensor, want: Tensor, scale: Tensor, roundings: int) -> None:
    """Assert that `got` is `want` but for so many roundings of terms as large as `scale`, and fp32 arithmetic."""
    bound = (roundings * UNIT[got.dtype] + FP32) * scale.abs() + 4 * TINY[got.dtype]
    assert (ratio := excess(got, want, bound)) <= 1, f"the error is {ratio:.3g} times its bound"


@pytest.mark.parametrize("shape", [(1, 8), (7, 80), (3, 5, 128), (2, 2048)])
def test_rms_norm(conformance_platform: Platform, capabilities: Capabilities, shape: tuple[int, ...]) -> None:
    """Also where epsilon decides, and where squares would overflow fp16."""
    device = conformance_platform.device().torch_device
    for dtype in dtypes(capabilities):
        for spread in (1e-3, 1.0, 300.0):
            generator = torch.Generator().manual_seed(0)
            x = (torch.randn(shape, generator=generator) * spread).to(dtype)
            weight = torch.randn(shape[-1], generator=generator).to(dtype)
            got = conformance_platform.ops().rms_norm(x.to(device), weight.to(device), 1e-5)
            y = x.double()
            want = y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
            close(got, want, want, 2)


def test_silu_and_mul(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Over the whole range, saturated ends included."""
    device = conformance_platform.device().torch_device
    for dtype in dtypes(capabilities):
        gate = torch.linspace(-30, 30, 999).to(dtype)
        up = torch.randn(999, generator=torch.Generator().manual_seed(0)).to(dtype)
        got = conformance_platform.ops().silu_and_mul(gate.to(device), up.to(device))
        want = F.silu(gate.double()) * up.double()
        close(got, want, want, 2)


@pytest.mark.parametrize("start", [0, 1000])
def test_rotary(conformance_platform: Platform, capabilities: Capabilities, start: int) -> None:
    """The two halves are the pairs, and positions count from where the chunk begins."""
    device = conformance_platform.device().torch_device
    for dtype in dtypes(capabilities):
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, heads, 9, 64, generator=generator).to(dtype) for heads in (6, 2))
        angle = torch.arange(start, start + 9)[:, None] * 10000.0 ** (-torch.arange(0, 64, 2) / 64)
        cos, sin = (torch.cat((x, x), -1)[None].to(dtype) for x in (angle.cos(), angle.sin()))
        got = conformance_platform.ops().rotary(*(x.to(device) for x in (q, k, cos, sin)))
        for made, x in zip(got, (q, k), strict=True):
            a, b = x.double().chunk(2, -1)
            c, s = (y.double()[:, None, :, :32] for y in (cos, sin))
            want = torch.cat((a * c - b * s, b * c + a * s), -1)
            scale = torch.cat((abs(a * c) + abs(b * s), abs(b * c) + abs(a * s)), -1)
            close(made, want, scale, 2)


def silu_gate(x: Tensor) -> Tensor:
    """Gate and up as two halves."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def interleaved_gate(x: Tensor) -> Tensor:
    """Gate and up as even and odd, clamped, as GPT-OSS has them."""
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate)


@pytest.mark.parametrize("gate", [silu_gate, interleaved_gate, F.relu], ids=lambda f: f.__name__)
def test_experts(
    conformance_platform: Platform,
    capabilities: Capabilities,
    examples: int,
    gate: Callable[[Tensor], Tensor],
    record_property: Callable[[str, object], None],
) -> None:
    """Both weight orders, with and without bias; experts that nobody chose, that do not exist, and chosen twice."""
    device = conformance_platform.device().torch_device
    gated = gate is not F.relu
    worst = 0.0

    @certify(20 * examples)
    @given(
        st.sampled_from(dtypes(capabilities)),
        st.tuples(st.integers(1, 9), st.sampled_from((1, 2, 5))),
        st.sampled_from((1, 3, 40)),
        st.booleans(),
        st.booleans(),
        st.integers(0, 2**31),
    )
    def drawn(
        dtype: torch.dtype, counts: tuple[int, int], num_tokens: int, transposed: bool, bias: bool, seed: int
    ) -> None:
        nonlocal worst
        num_experts, top_k = counts
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, spread: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * spread).to(dtype)

        hidden, inner, width = 32, 48, 96 if gated else 48
        x = draw(num_tokens, hidden)
        up, down = draw(num_experts, width, hidden, spread=hidden**-0.5), draw(num_experts, hidden, inner, spread=0.2)
        up_bias, down_bias = (draw(num_experts, n) if bias else None for n in (width, hidden))
        ids = torch.randint(0, num_experts + 2, (num_tokens, top_k), generator=generator)
        scores = torch.rand(num_tokens, top_k, generator=generator).to(dtype)

        stored = [w.transpose(1, 2).contiguous() if transposed else w for w in (up, down)]
        weights = ExpertWeights(
            stored[0].to(device),
            stored[1].to(device),
            gate,
            None if up_bias is None else up_bias.to(device),
            None if down_bias is None else down_bias.to(device),
        )
        method = conformance_platform.experts(ExpertsSpec(num_experts, top_k, gated, transposed, dtype))
        inputs = x.to(device), ids.to(device), scores.to(device)
        got = method.apply(*inputs, weights)
        for before, after in zip((x, ids, scores), inputs, strict=True):
            assert torch.equal(before, after.cpu()), "an input was changed"
        assert got.dtype == dtype
        want, bound = routed(x, ids, scores, up, down, up_bias, down_bias, gate)
        worst = max(worst, excess(got, want, bound))
        assert worst <= 1, f"the error is {worst:.3g} times its bound"

    drawn()
    record_property("error over bound: experts", worst)


def test_experts_sum_in_fp32(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """A small expert between two large ones of opposite sign is not lost: a sum in 16 bits would lose it."""
    device = conformance_platform.device().torch_device
    for dtype in dtypes(capabilities):
        size, factors = 32, torch.tensor([4096.0, 1.0, -4096.0])
        eye = torch.eye(size).to(dtype).expand(3, size, size).contiguous().to(device)
        weights = ExpertWeights(eye, eye * factors.to(device, dtype)[:, None, None], F.relu)
        method = conformance_platform.experts(ExpertsSpec(3, 3, False, False, dtype))
        ids = torch.arange(3, device=device).expand(5, 3).contiguous()
        ones = torch.ones(5, size, dtype=dtype, device=device)
        got = method.apply(ones, ids, torch.ones(5, 3, dtype=dtype, device=device), weights)
        assert torch.equal(got, ones), dtype


def routed(
    x: Tensor,
    ids: Tensor,
    scores: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The weighted sum in fp64, and its bound: each product rounds its result and sums in fp32.

    How far the activation, which is given and works elementwise on pairs, carries an error is taken from moving its
    inputs by that error in every combination of signs. Errors of the second product's terms are independent, so that
    they add like random ones: three times the root of the sum of squares.
    """
    unit, tiny = UNIT[x.dtype], TINY[x.dtype]
    want = torch.zeros(x.shape, dtype=torch.float64)
    bound = torch.zeros_like(want)
    for token in range(x.shape[0]):
        for column in range(ids.shape[1]):
            expert = int(ids[token, column])
            if expert >= up.shape[0]:
                continue
            row, score = x[token].double(), float(scores[token, column])
            first, second = up[expert].double(), down[expert].double()
            b1 = torch.zeros(first.shape[0]).double() if up_bias is None else up_bias[expert].double()
            b2 = torch.zeros(second.shape[0]).double() if down_bias is None else down_bias[expert].double()
            h = first @ row + b1
            # A bias may be added after the product was rounded.
            h_error = 2 * unit * (h.abs() + b1.abs()) + FP32 * (first.abs() @ row.abs()) + tiny
            a = gate(h)
            moved = [gate((h + sign * h_error).to(x.dtype)).double() for sign in signs(len(h))]
            a_error = torch.stack([(m - a).abs() for m in moved]).amax(0) + unit * a.abs() + tiny
            y = second @ a + b2
            y_error = 3 * (second.square() @ a_error.square()).sqrt()
            y_error += 2 * unit * (y.abs() + b2.abs()) + FP32 * (second.abs() @ a.abs())
            want[token] += score * y
            bound[token] += abs(score) * (y_error + FP32 * y.abs())
    return want, bound + unit * want.abs() + 4 * tiny


def signs(count: int) -> list[Tensor]:
    """Vectors of signs such that pairs of halves, and pairs of neighbours, see every combination."""
    same = torch.ones(count, dtype=torch.float64)
    neighbours = same * (-1.0) ** torch.arange(count)
    halves = torch.where(torch.arange(count) < count // 2, same, -same)
    return [same, -same, neighbours, -neighbours, halves, -halves]


def test_linear(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Unquantised layers are torch's or the platform's, with the same result; unknown schemes are refused."""
    device = conformance_platform.device().torch_device
    method = conformance_platform.linear(None)
    for dtype in dtypes(capabilities):
        generator = torch.Generator().manual_seed(0)
        x, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((5, 96), (40, 96), (40,)))
        for b in (None, bias):
            y, w, c = x.to(device), weight.to(device), None if b is None else b.to(device)
            got = F.linear(y, w, c) if method is None else method.apply(y, method.pack(w, c))
            product = x.double() @ weight.double().T
            offset = torch.zeros(40).double() if b is None else b.double()
            scale = FP32 * (x.double().abs() @ weight.double().abs().T)
            want = product + offset
            bound = scale + 2 * UNIT[dtype] * (product.abs() + want.abs()) + 4 * TINY[dtype]
            assert excess(got, want, bound) <= 1
    with pytest.raises(UnsupportedCapability):
        conformance_platform.linear(QuantScheme("nobody:nothing", 3))
