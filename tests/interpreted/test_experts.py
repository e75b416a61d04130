"""The experts' product as a device with tile copies runs it, which the interpreter's own device is not."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine_sdk import ExpertsSpec, ExpertWeights, TorchExperts
from engine_sdk.triton.experts import TritonExperts
from engine_sdk.triton.tuning import device_properties


def gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    gated: Tensor = F.silu(a) * b
    return gated


@pytest.mark.parametrize(
    ("tokens", "inner", "silu", "bias"), [(3, 80, True, True), (200, 136, True, False), (40, 80, False, True)]
)
def test_tile_copies(tokens: int, inner: int, silu: bool, bias: bool) -> None:
    """Columns beyond an expert's are the next one's rows, and depth beyond the weight's is zero: neither may show."""
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).div(shape[-1] ** 0.5)

    up, down = randn(4, 2 * inner, 72), randn(4, 72, inner)
    biases = (randn(4, 2 * inner), randn(4, 72)) if bias else (None, None)
    weights = ExpertWeights(up, down, gate, *biases)
    scores, ids = torch.rand(tokens, 5, generator=generator).topk(2)  # a fifth expert, which is not here
    spec = ExpertsSpec(4, 2, gated=True, transposed=False, dtype=up.dtype, silu=silu)
    device = replace(device_properties(up.device), tile_copies=True)
    x = randn(tokens, 72)
    got = TritonExperts(spec, device=device).apply(x, ids, scores, weights)
    torch.testing.assert_close(got, TorchExperts(spec).apply(x, ids, scores, weights), rtol=1e-5, atol=1e-5)
