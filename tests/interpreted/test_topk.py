"""The short top-k against torch's."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from engine_sdk.triton.topk import ShortTopK, short_topk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "k"), [((5, 128), 8), ((2, 3, 60), 4), ((1, 1), 1), ((3, 300), 32), ((0, 8), 2)])
def test_short_topk(shape: tuple[int, ...], k: int, dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(dtype)
    values, indices = short_topk(x, k)
    want = x.float().sort(dim=-1, descending=True, stable=True)
    assert values.dtype == dtype
    assert torch.equal(indices, want.indices[..., :k])
    assert torch.equal(values.float(), want.values[..., :k])


def test_what_compares_oddly() -> None:
    """NaN first, infinities, zeros of both signs, and columns that lie apart."""
    x = torch.tensor([[-1.0, torch.nan, torch.inf, -torch.inf, 0.0, -torch.nan, 5.0]])
    values, indices = short_topk(x, 7)
    assert indices.tolist() == [[1, 5, 2, 6, 4, 0, 3]]
    assert torch.equal(values.nan_to_num(9, 8, -8), x[:, indices[0]].nan_to_num(9, 8, -8))
    apart = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(short_topk(apart, 3)[1], apart.topk(3).indices)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled() -> None:
    """A router's choice becomes the short one; a choice between rows, or among an unknown number, stays torch's."""
    weight = torch.nn.Parameter(torch.randn(32, 128, generator=torch.Generator().manual_seed(0)))

    def route(x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        scores = (x @ weight).softmax(-1)
        return *scores.topk(8), *scores.topk(2, dim=0), *other.topk(2)

    options: dict[str, Any] = {"post_grad_custom_pre_pass": ShortTopK()}
    compiled = torch.compile(route, dynamic=True, fullgraph=True, options=options)
    inputs = torch.randn(9, 32), torch.randn(3, 40)
    with torch.no_grad():
        got, code = run_and_get_code(compiled, *inputs)
        for a, b in zip(got, route(*inputs), strict=True):
            torch.testing.assert_close(a, b)
    calls = [line for line in code[0].splitlines() if "topk.default(" in line]
    assert ["short_topk" in line for line in calls] == [True, False, False], calls
