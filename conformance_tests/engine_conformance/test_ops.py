"""L1: token-wise operations and experts against fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine_conformance.cases import Scale, dtypes
from engine_conformance.reference import FP32, TINY, UNIT, excess
from engine_sdk import (
    Capabilities,
    ExpertsSpec,
    ExpertWeights,
    LinearMethod,
    Platform,
    QuantScheme,
    QuantWeight,
    UnsupportedCapability,
)


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


@pytest.mark.parametrize("shape", [(1, 8), (7, 80), (2, 2048)])
def test_add_rms_norm(conformance_platform: Platform, capabilities: Capabilities, shape: tuple[int, ...]) -> None:
    """The sum is rounded once and comes back, and the norm is that of the rounded sum."""
    device = conformance_platform.device().torch_device
    for dtype in dtypes(capabilities):
        generator = torch.Generator().manual_seed(0)
        x, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        weight = torch.randn(shape[-1], generator=generator).to(dtype)
        given = x.to(device), residual.to(device)
        got, total = conformance_platform.ops().add_rms_norm(*given, weight.to(device), 1e-5)
        assert torch.equal(total.cpu(), x + residual)
        assert torch.equal(given[0].cpu(), x), "an input was changed"
        assert torch.equal(given[1].cpu(), residual), "an input was changed"
        y = (x + residual).double()
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
@pytest.mark.parametrize("dim", [8, 64, 80])
def test_rotary(conformance_platform: Platform, capabilities: Capabilities, start: int, dim: int) -> None:
    """The two halves are the pairs, and positions count from where the chunk begins; inputs are kept."""
    for dtype in dtypes(capabilities):
        for heads in ((6, 2), (1, 1)):
            turned(conformance_platform, dtype, (1,), heads, dim, torch.arange(start, start + 9)[None])


def test_rotary_broadcasts(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Sequences of a batch have positions of their own; queries and keys may be views of token-major tensors."""
    positions = torch.tensor([[0, 1, 2, 3], [70, 71, 5, 3000], [9, 8, 7, 6]])
    for dtype in dtypes(capabilities):
        turned(conformance_platform, dtype, (3,), (4, 2), 64, positions)
        turned(conformance_platform, dtype, (), (4, 2), 64, positions[1])


def turned(
    platform: Platform,
    dtype: torch.dtype,
    batch: tuple[int, ...],
    heads: tuple[int, int],
    dim: int,
    positions: Tensor,
) -> None:
    """Check `rotary` for q and k [*batch, heads, N, dim] at positions [*batch, N]."""
    device, generator = platform.device().torch_device, torch.Generator().manual_seed(0)
    token_major = ((*batch, positions.shape[-1], n, dim) for n in heads)
    q, k = (torch.randn(shape, generator=generator).to(dtype).to(device).transpose(-3, -2) for shape in token_major)
    angle = positions[..., None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    cos, sin = (torch.cat((x, x), -1).to(dtype).to(device) for x in (angle.cos(), angle.sin()))
    before = [x.clone() for x in (q, k, cos, sin)]
    got = platform.ops().rotary(q, k, cos, sin)
    assert all(torch.equal(x, kept) for x, kept in zip((q, k, cos, sin), before, strict=True)), "an input was changed"
    for made, x in zip(got, (q, k), strict=True):
        assert (made.dtype, made.shape, made.device) == (dtype, x.shape, x.device)
        a, b = x.double().cpu().chunk(2, -1)
        c, s = (y.double().cpu().unsqueeze(-3)[..., : dim // 2] for y in (cos, sin))
        want = torch.cat((a * c - b * s, b * c + a * s), -1)
        scale = torch.cat((abs(a * c) + abs(b * s), abs(b * c) + abs(a * s)), -1)
        close(made, want, scale, 2)


def test_ops_keep_their_inputs(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Inputs are not changed, views are taken as they are, and results are tensors of their own."""
    ops, device = conformance_platform.ops(), conformance_platform.device().torch_device
    for dtype in dtypes(capabilities):
        generator = torch.Generator().manual_seed(3)
        wide = torch.randn(6, 2 * 64, generator=generator).to(dtype).to(device)
        gate, up = wide.chunk(2, -1)  # as one product makes them
        weight = torch.randn(64, generator=generator).to(dtype).to(device)
        kept = wide.clone(), weight.clone()
        normed = ops.rms_norm(gate, weight, 1e-6)
        again = ops.rms_norm(up, weight, 1e-6)
        y = gate.double().cpu()
        want = y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-6) * weight.double().cpu()
        close(normed, want, want, 2)
        assert normed.dtype == again.dtype == dtype
        product = ops.silu_and_mul(gate, up)
        expected = F.silu(gate.double().cpu()) * up.double().cpu()
        close(product, expected, expected, 2)
        assert product.dtype == dtype
        assert torch.equal(wide, kept[0]), "an input was changed"
        assert torch.equal(weight, kept[1]), "the weight was changed"
        close(normed, want, want, 2)  # and a later call has not written over it


def test_norm_of_extremes(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Rows of zeros, one large element, and large sizes; squares are summed in fp32."""
    ops, device = conformance_platform.ops(), conformance_platform.device().torch_device
    for dtype in dtypes(capabilities):
        x = torch.zeros(4, 5120, dtype=dtype)
        x[1, 17] = 1000.0
        x[2] = 0.125
        x[3] = torch.randn(5120, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
        weight = torch.linspace(-2, 2, 5120).to(dtype)
        for eps in (1e-6, 1e-5, 1.0):
            got = ops.rms_norm(x.to(device), weight.to(device), eps)
            y = x.double()
            want = y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps) * weight.double()
            close(got, want, want, 2)


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
    scale: Scale,
    gate: Callable[[Tensor], Tensor],
    record_property: Callable[[str, object], None],
) -> None:
    """Both weight orders, with and without bias, a gate that may be fused and one that may not; experts that nobody
    chose, that do not exist, and chosen twice.
    """
    device = conformance_platform.device().torch_device
    gated = gate is not F.relu
    worst = 0.0

    @scale.certify(20)
    @given(
        st.sampled_from(dtypes(capabilities)),
        st.tuples(st.integers(1, 9), st.sampled_from((1, 2, 5))),
        st.sampled_from((1, 3, 40)),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.integers(0, 2**31),
    )
    def drawn(
        dtype: torch.dtype,
        counts: tuple[int, int],
        num_tokens: int,
        transposed: bool,
        bias: bool,
        named: bool,
        seed: int,
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
        silu = named and gate is silu_gate
        method = conformance_platform.experts(ExpertsSpec(num_experts, top_k, gated, transposed, dtype, silu))
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


def test_linear_of_any_shape(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """One token, many, batches and views; the input is kept and every layer has weights of its own."""
    device = conformance_platform.device().torch_device
    method = conformance_platform.linear(None)
    if method is None:  # torch's own
        return
    for dtype in dtypes(capabilities):
        generator = torch.Generator().manual_seed(0)
        layers = [torch.randn(n, 64, generator=generator).to(dtype) for n in (48, 1, 130)]
        packed = [method.pack(w.to(device), None) for w in layers]
        for x in (torch.randn(1, 64), torch.randn(300, 64), torch.randn(2, 3, 64), torch.randn(5, 128)[:, ::2]):
            x = x.to(dtype)
            there = x.to(device)
            for weight, mine in zip(layers, packed, strict=True):
                got = method.apply(there, mine)
                want = x.double() @ weight.double().T
                bound = FP32 * (x.double().abs() @ weight.double().abs().T) + UNIT[dtype] * want.abs() + 4 * TINY[dtype]
                assert got.dtype == dtype
                assert excess(got, want, bound) <= 1
            assert torch.equal(there.cpu(), x), "the input was changed"


@pytest.mark.conformance(capability="quant_schemes")
def test_quantised_linear(
    conformance_platform: Platform, capabilities: Capabilities, record_property: Callable[[str, object], None]
) -> None:
    """Every declared scheme rounds a weight with an error that its bits explain, and keeps stored integers exactly."""
    if not capabilities.quant_schemes:
        record_property("rejected", "quant_schemes")
        return
    device = conformance_platform.device().torch_device
    for name in sorted(capabilities.quant_schemes):
        taken = 0
        for bits in (8, 4):
            for group in (None, 128, 64, 32):
                try:
                    method = conformance_platform.linear(QuantScheme(name, bits, group))
                except UnsupportedCapability:
                    continue
                assert method is not None, f"{name}: linear() answers None, which is for unquantised layers"
                taken += 1
                for dtype in dtypes(capabilities):
                    generator = torch.Generator().manual_seed(bits)
                    x, weight = (torch.randn(n, 256, generator=generator).to(dtype) for n in (7, 96))
                    got = method.apply(x.to(device), method.pack(weight.to(device), None))
                    want = x.double() @ weight.double().T
                    error = float((got.double().cpu() - want).norm() / want.norm())
                    assert error < (0.04 if bits == 8 else 0.3), (
                        f"{name}, {bits} bits, {dtype}: relative error {error:.2g}"
                    )
                    for zeros in (False, True):
                        _check_stored(method, QuantScheme(name, bits, group), x, zeros, device)
        assert taken, f"{name} is declared, and linear() takes it with no number of bits and no group size"


def _check_stored(method: LinearMethod, scheme: QuantScheme, x: Tensor, zeros: bool, device: torch.device) -> None:
    """Any integers, scales and zeros; a method may round weights to the dtype of `x`, and no more.

    A method that takes float weights only, or gives no rows back, says so.
    """
    generator, limit = torch.Generator().manual_seed(7), 1 << (scheme.bits - 1)
    groups = x.shape[1] // (scheme.group_size or x.shape[1])

    def draw(columns: int) -> Tensor:
        return torch.randint(-limit, limit, (40, columns), generator=generator).to(torch.int8)

    stored = QuantWeight(
        draw(x.shape[1]),
        (torch.rand(40, groups, generator=generator) + 0.1).to(x.dtype) / limit,
        draw(groups) if zeros else None,
    )
    bias = torch.randn(40, generator=generator).to(x.dtype)
    there = QuantWeight(*(None if t is None else t.to(device) for t in (stored.values, stored.scales, stored.zeros)))  # type: ignore[arg-type]
    try:
        packed = method.pack_quantized(there, bias.to(device))
    except UnsupportedCapability:
        return
    offsets, scales = (
        torch.zeros(1) if t is None else t.double().repeat_interleave(x.shape[1] // groups, 1)
        for t in (stored.zeros, stored.scales)
    )
    weight = (stored.values.double() - offsets) * scales
    product, unit = x.double() @ weight.T, UNIT[x.dtype]
    want = product + bias.double()
    reach = x.double().abs() @ ((stored.values.double().abs() + offsets.abs()) * scales).T
    bound = (unit + FP32) * (x.double().abs() @ weight.abs().T) + FP32 * reach
    bound += 2 * unit * (product.abs() + want.abs()) + 4 * TINY[x.dtype]
    ratio = excess(method.apply(x.to(device), packed), want, bound)
    assert ratio <= 1, f"{scheme}, {x.dtype}, zeros {zeros}: the error is {ratio:.3g} times its bound"
    try:
        rows = method.rows(torch.tensor([[39, 0, 7]], device=device), packed)
    except UnsupportedCapability:
        return
    assert excess(rows, weight[[39, 0, 7]][None], 2 * unit * weight[[39, 0, 7]][None].abs() + TINY[x.dtype]) <= 1


def test_experts_refuse_what_is_not_declared(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Dtypes outside of the declared ones."""
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        if dtype not in capabilities.dtypes:
            with pytest.raises(UnsupportedCapability):
                conformance_platform.experts(ExpertsSpec(4, 2, True, False, dtype))
