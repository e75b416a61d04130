"""What the host computes in one kernel where a model's own code takes several operations: an ``engine.plugins`` plugin.

A swap is made for models whose linear layers `PackedLinear` packs, so for this platform only, and where a part of the
model computes what the kernel computes: the name of its class proposes, a comparison on random numbers decides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine_sdk import LinearMethod, hookimpl

if TYPE_CHECKING:
    from engine_cpu.operations import Operations


@hookimpl
def engine_swaps() -> Mapping[str, Callable[..., Any]]:
    """One swap."""
    return {"cpu": lambda model, seen, packs: [_Parts(model)] if packs else []}


class _Parts:
    """The parts of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def allocate(self, device: torch.device) -> None:
        """Nothing has storage of its own."""

    def pack(self, method: LinearMethod) -> None:
        """Exchange what is the same; the weights are there now."""
        from engine_cpu import native
        from engine_cpu.linear import PackedLinear
        from engine_cpu.operations import Operations

        if not isinstance(method, PackedLinear) or (kernels := native.library()) is None:
            return
        operations = Operations(kernels)
        self._shared_linears(operations)
        for kinds in ("RMSNorm", "MLP"):
            found = [m for m in self._model.modules() if type(m).__name__.endswith(kinds)]
            swap = {"RMSNorm": self._norm, "MLP": self._gated}[kinds]
            for module in found:
                swap(module, operations)

    def _norm(self, module: nn.Module, operations: Operations) -> None:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.dim() != 1:
            return
        _exchange(module, lambda x: operations.rms_norm(x, weight, eps), len(weight), weight.dtype)

    def _gated(self, module: nn.Module, operations: Operations) -> None:
        gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
        if not all(isinstance(part, nn.Linear) for part in (gate, up, down)):
            return
        assert gate is not None
        assert up is not None
        assert down is not None
        _exchange(module, lambda x: down(operations.silu_and_mul(gate(x), up(x))), gate.in_features, gate.weight.dtype)

    def _shared_linears(self, operations: Operations) -> None:
        """Linear layers that share their weight with an embedding, which keeps it row by row."""
        embedded = {id(m.weight) for m in self._model.modules() if isinstance(m, nn.Embedding)}
        for module in self._model.modules():
            if type(module) is nn.Linear and id(module.weight) in embedded and module.bias is None:
                weight = module.weight
                _exchange(
                    module,
                    lambda x, weight=weight: operations.few_rows(x, weight),
                    module.in_features,
                    weight.dtype,
                )


_CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Norm of the difference of two ways to compute the same, over the norm of the result: some units of rounding."""


def _exchange(module: nn.Module, forward: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype) -> None:
    """Let `module` call `forward` if it takes one tensor [..., width] and gives what `forward` gives."""
    if dtype not in _CLOSE or len(inspect.signature(module.forward).parameters) != 1:
        return
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        with torch.inference_mode():
            want, got = module(x).double(), forward(x).double()
    except (RuntimeError, TypeError, ValueError, AttributeError):  # it is something else
        return
    if want.shape == got.shape and bool((want - got).norm() <= _CLOSE[dtype] * want.norm()):
        module.forward = forward
