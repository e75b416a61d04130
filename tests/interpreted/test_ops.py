"""Strides and shapes that models bring, of which the conformance suite has few."""

import pytest
import torch
from torch import Tensor

from engine_sdk import REFERENCE_OPS
from engine_sdk.triton.ops import add_rms_norm, rms_norm, rotary, silu_and_mul


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(0, 8), (5, 1), (3, 70), (2, 3, 128), (1, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = randn(*shape).to(dtype), randn(*shape, seed=1).to(dtype), randn(shape[-1]).to(dtype)
    rtol, atol = (1e-5, 1e-6) if dtype is torch.float32 else (2e-2, 1e-2)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), REFERENCE_OPS.rms_norm(x, weight, 1e-6), rtol=rtol, atol=atol)
    got, want = add_rms_norm(x, residual, weight, 1e-6), REFERENCE_OPS.add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(got[0], want[0], rtol=rtol, atol=atol)
    assert torch.equal(got[1], want[1])


def test_norm_of_heads_in_a_fused_projection() -> None:
    fused, weight = randn(6, 4 * 32), randn(32)
    heads = fused[:, 32:96].view(6, 2, 32)
    torch.testing.assert_close(rms_norm(heads, weight, 1e-6), REFERENCE_OPS.rms_norm(heads, weight, 1e-6))


@pytest.mark.parametrize("shape", [(1, 6), (7, 100), (2, 3, 40)])
def test_gates_that_are_halves(shape: tuple[int, ...]) -> None:
    gate, up = (randn(*shape) * 10).chunk(2, -1)
    torch.testing.assert_close(silu_and_mul(gate, up), REFERENCE_OPS.silu_and_mul(gate, up))


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(1, 1, 2), (6, 2, 64), (5, 5, 80)])
@pytest.mark.parametrize("fused", [False, True])
def test_rotary(heads: int, kv_heads: int, size: int, fused: bool) -> None:
    """Tokens first, as a projection leaves them, and cos and sin shared by a batch of two."""
    both = randn(2, 9, (heads + kv_heads) * size)
    q, k = (
        both.split((heads * size, kv_heads * size), -1) if fused else (randn(2, 9, h * size) for h in (heads, kv_heads))
    )
    q, k = (x.view(2, 9, -1, size).transpose(1, 2) for x in (q, k))
    cos, sin = randn(1, 9, size, seed=2), randn(1, 9, size, seed=3)
    for got, want in zip(rotary(q, k, cos, sin), REFERENCE_OPS.rotary(q, k, cos, sin), strict=True):
        torch.testing.assert_close(got, want)
