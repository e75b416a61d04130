"""Torch's operators that the engine's defaults need, tried one by one on a device: what a new backend still lacks.

A trial draws tiny inputs, runs one operator on the device and on the host, and compares. `NEEDED` lists them; their
shapes mean nothing beyond being small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.discovery import describe
from engine.interfaces import Platform


class Inputs:
    """Draws a trial's inputs: the same values whatever the device.

    Args:
        device: where the operator runs.
        dtype: what `values` gives.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def values(self, *shape: int) -> Tensor:
        """Normal values in a floating dtype, small and not negative in another."""
        if self.dtype.is_floating_point:
            return torch.randn(shape, generator=self._generator).to(self.dtype).to(self.device)
        return torch.randint(0, 100, shape, generator=self._generator).to(self.dtype).to(self.device)

    def fp32(self, *shape: int) -> Tensor:
        """Normal values in fp32."""
        return torch.randn(shape, generator=self._generator).to(self.device)

    def index(self, *values: int) -> Tensor:
        """These int64 values."""
        return torch.tensor(values).to(self.device)

    def mask(self, rows: int, columns: int) -> Tensor:
        """The lower triangle, the last columns of which are all visible to the last row."""
        return torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows).to(self.device)


class Operator(NamedTuple):
    """One operator and where the engine needs it.

    Attributes:
        name: as torch spells it.
        needed: the part of the engine, and what for.
        run: makes the result.
        dtypes: to try; None stands for the dtypes that the platform declares.
    """

    name: str
    needed: str
    run: Callable[[Inputs], Tensor]
    dtypes: tuple[torch.dtype, ...] | None = None


def _attend(i: Inputs, mask: Tensor | None) -> Tensor:
    q, k, v = (i.values(2, 3, 4, 16) for _ in range(3))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=0.25)


def _scatter(i: Inputs) -> Tensor:
    return i.values(2, 9).scatter_add_(1, i.index(0, 1, 0, 8).expand(2, 4), i.values(2, 4))


def _assign(i: Inputs) -> Tensor:
    x = i.values(9, 2)
    x[i.index(5, 2)] = i.values(2, 2)
    return x


INT32, INT64, FP32, UINT8 = (torch.int32,), (torch.int64,), (torch.float32,), (torch.uint8,)
STAGED = (torch.int32, torch.int64, torch.float32, torch.bool)

NEEDED: tuple[Operator, ...] = (
    Operator("copy_", "staging: host to device", lambda i: i.values(64).clone(), (*UINT8, *STAGED)),
    Operator("view(dtype)", "staging: arrays in one buffer", lambda i: i.values(64).view(torch.int32), UINT8),
    Operator("zeros", "KV cache: the buffer", lambda i: torch.zeros(64, dtype=i.dtype, device=i.device), UINT8),
    Operator("view(dtype)", "KV cache: a layer's blocks", lambda i: i.values(8, 64).view(UINT8[0]).view(i.dtype)),
    Operator("index_select", "KV cache: export", lambda i: i.values(8, 4, 16).index_select(0, i.index(5, 2))),
    Operator(
        "index_copy_",
        "KV cache: copy and import",
        lambda i: i.values(8, 4, 16).index_copy_(0, i.index(5, 2), i.values(2, 4, 16)),
    ),
    Operator(
        "index_put_",
        "attention: write keys and values",
        lambda i: i.values(8, 4, 3, 16).index_put_((i.index(1, 5), i.index(3, 0)), i.values(2, 3, 16)),
    ),
    Operator(
        "index_select(out=)",
        "attention: gather blocks",
        lambda i: torch.index_select(i.values(8, 4, 16), 0, i.index(5, 2), out=i.values(2, 4, 16)),
    ),
    Operator(
        "masked_fill_",
        "attention: clear hidden keys",
        lambda i: i.values(4, 4, 3).masked_fill_(~i.mask(4, 4)[..., None], 0),
    ),
    Operator(
        "scaled_dot_product_attention(mask)",
        "attention: decode, later chunks of a prompt",
        lambda i: _attend(i, i.mask(4, 4)),
    ),
    Operator(
        "scaled_dot_product_attention(is_causal)",
        "attention: the first chunk of a prompt",
        lambda i: _attend(i, None),
    ),
    Operator("sort(stable)", "attention: plan", lambda i: torch.stack(i.values(9).sort(stable=True)), INT32),
    Operator("div(floor)", "attention: plan", lambda i: torch.div(i.values(9), 7, rounding_mode="floor"), INT64),
    Operator("where", "attention: plan", lambda i: torch.where(i.values(9) < 50, i.values(9), 0), INT32),
    Operator(
        "matmul", "attention: scores for softcap, sinks, ALiBi", lambda i: i.values(2, 4, 8) @ i.values(8, 4), FP32
    ),
    Operator("tanh_", "attention: softcap", lambda i: i.values(9).tanh_(), FP32),
    Operator("logsumexp", "attention: scores; log probabilities", lambda i: i.values(3, 9).logsumexp(-1), FP32),
    Operator("logaddexp", "attention: sinks", lambda i: torch.logaddexp(i.values(9), i.values(9)), FP32),
    Operator("embedding", "model", lambda i: F.embedding(i.index(5, 2), i.values(8, 16))),
    Operator("linear", "model, experts", lambda i: F.linear(i.values(3, 16), i.values(8, 16), i.values(8))),
    Operator("rsqrt", "model: norms", lambda i: torch.rsqrt(i.values(3, 16).square().mean(-1, keepdim=True) + 1), FP32),
    Operator("cos", "model: rotary embedding", lambda i: torch.cat((i.values(9).cos(), i.values(9).sin())), FP32),
    Operator("silu", "model: activation", lambda i: F.silu(i.values(9)) * i.values(9)),
    Operator("gelu(tanh)", "model: activation", lambda i: F.gelu(i.values(9), approximate="tanh")),
    Operator("softmax", "model: routing to experts", lambda i: F.softmax(i.values(3, 8), -1, dtype=torch.float)),
    Operator(
        "where",
        "experts: rows of one expert",
        lambda i: torch.where((i.index(0, 1, 0) == 0)[:, None], i.values(3, 8), i.values(3, 8)),
    ),
    Operator("to(float32)", "experts: sum in fp32", lambda i: i.values(9).float() * i.fp32(9)),
    Operator("max(dim)", "sampler: greedy", lambda i: torch.cat([t.double().cpu() for t in i.values(3, 9).max(-1)])),
    Operator("isfinite", "sampler: rows that are no distribution", lambda i: i.values(9).isfinite()),
    Operator("exp_", "sampler: temperature", lambda i: i.values(9).exp_(), FP32),
    Operator("topk", "sampler: top_k; log probabilities", lambda i: i.values(3, 64).topk(5, -1).values, FP32),
    Operator("gather", "sampler", lambda i: i.values(3, 9).gather(-1, i.index(2, 0, 8)[:, None]), FP32),
    Operator("cumsum", "sampler: draw", lambda i: i.values(3, 9).cumsum(-1), INT64),
    Operator("cumsum(int32)", "sampler: ties", lambda i: (i.values(3, 9) > 0).cumsum(-1, dtype=torch.int32), FP32),
    Operator(
        "searchsorted",
        "sampler: draw",
        lambda i: torch.searchsorted(i.values(3, 9).cumsum(-1), i.values(3, 1), right=True),
        INT64,
    ),
    Operator("scatter_add_", "sampler: top_p", _scatter, INT64),
    Operator(">>, &", "sampler: fixed point", lambda i: (i.values(9) >> 2) & 7, INT64),
    Operator("view(int32)", "sampler: top_p; log probabilities", lambda i: i.values(9).view(torch.int32), FP32),
    Operator(
        "index_add_", "sampler: penalties, bias", lambda i: i.values(9).index_add_(0, i.index(5, 2), i.values(2)), FP32
    ),
    Operator("index_add_", "sampler: history", lambda i: i.values(9).index_add_(0, i.index(5, 2), i.values(2)), INT32),
    Operator("index_fill_", "sampler: bans", lambda i: i.values(9).index_fill_(0, i.index(5, 2), -torch.inf), FP32),
    Operator("[index] =", "sampler: rows of a group", _assign, (*INT64, *FP32)),
)
"""What `TorchAttention`, `TorchExperts`, the sampler, staging and the usual decoder layer call."""


def unsupported(platform: Platform) -> Iterator[tuple[Operator, torch.dtype, str]]:
    """Try `NEEDED` on the platform's device; yields those that fail, the dtype, and what went wrong."""
    device = platform.device()
    device.activate()
    declared = sorted(platform.capabilities().dtypes, key=str)
    for operator in NEEDED:
        for dtype in declared if operator.dtypes is None else operator.dtypes:
            want = operator.run(Inputs(torch.device("cpu"), dtype))
            try:
                got = operator.run(Inputs(device.torch_device, dtype)).cpu()
            except Exception as error:  # whatever a backend raises is what is reported
                yield operator, dtype, describe(error).partition("\n")[0]
                continue
            # Loose, since this asks what is there; how exact it must be is the conformance suite's question.
            loose = 0.05 if want.is_floating_point() else 0.0
            if got.dtype != want.dtype or not torch.allclose(got.double(), want.double(), loose, loose):
                yield operator, dtype, "its result differs from the host's"
