"""What the host computes in one kernel where a model's own code takes several operations: an ``engine.plugins`` plugin.

A swap is made for models whose linear layers `PackedLinear` packs, so for this platform only, and where a part of the
model computes what the kernel computes: the name of its class proposes, a comparison on random numbers decides.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine_sdk import LinearMethod, hookimpl, norm_of, same_result

if TYPE_CHECKING:
    from engine_cpu.linear import PackedLinear
    from engine_cpu.operations import Operations


@hookimpl
def engine_swaps() -> Mapping[str, Callable[..., Any]]:
    """One swap."""
    return {"cpu": lambda model, seen, linear: [_Parts(model)]}


class _Parts:
    """The parts of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def allocate(self, device: torch.device) -> None:
        """Nothing has storage of its own."""

    def pack(self, method: LinearMethod) -> None:
        """Exchange what is the same; the weights are there now."""
        from engine_cpu import native
        from engine_cpu.layers import exchange_layers
        from engine_cpu.linear import PackedLinear
        from engine_cpu.operations import Operations

        if not isinstance(method, PackedLinear) or (kernels := native.library()) is None:
            return
        operations = Operations(kernels)
        self._shared(method)
        exchange_layers(self._model, kernels, operations)
        self._rotations(operations)
        for kinds in ("RMSNorm", "MLP"):
            found = [m for m in self._model.modules() if type(m).__name__.endswith(kinds)]
            swap = {"RMSNorm": self._norm, "MLP": self._gated}[kinds]
            for module in found:
                swap(module, operations)

    def _norm(self, module: nn.Module, operations: Operations) -> None:
        norm = norm_of(module)
        if norm is None or norm.weight.dim() != 1:
            return
        _exchange(module, lambda x: operations.rms_norm(x, norm.weight, norm.eps), len(norm.weight), norm.weight.dtype)

    def _gated(self, module: nn.Module, operations: Operations) -> None:
        gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
        if not all(isinstance(part, nn.Linear) for part in (gate, up, down)):
            return
        assert gate is not None
        assert up is not None
        assert down is not None
        _exchange(module, lambda x: down(operations.silu_and_mul(gate(x), up(x))), gate.in_features, gate.weight.dtype)

    def _shared(self, method: PackedLinear) -> None:
        """Pack weights that embeddings and linear layers share, where nothing else has them."""
        users: dict[Tensor, list[nn.Module]] = {}
        for module in self._model.modules():
            for parameter in module.parameters(recurse=False):
                users.setdefault(parameter, []).append(module)
        for weight, modules in users.items():
            own = [m for m in modules if "forward" not in vars(m)]  # a rank's share of a table has another
            embeddings = [m for m in own if type(m) is nn.Embedding and m.max_norm is None]
            linears = [m for m in own if type(m) is nn.Linear and m.bias is None]
            if not embeddings or not linears or len(embeddings) + len(linears) < len(modules):
                continue
            if weight.dtype != torch.bfloat16:  # no rows can be looked up in oneDNN's order
                continue
            packed = method.pack(weight.data, None)
            if packed.product is None:
                continue
            shape = nn.Parameter(weight.data.to("meta"), requires_grad=False)  # and dtype, for code that asks for them
            for module in modules:
                forward = method.look_up if module in embeddings else method.apply
                module.forward, module.weight = functools.partial(forward, packed=packed), shape

    def _rotations(self, operations: Operations) -> None:
        """Attention that turns queries and keys by a function of its own file: let it find the kernel under that name.

        Where the kernel does not take what it is called with, the function serves.
        """
        changed: dict[type, FunctionType | None] = {}
        for module in self._model.modules():
            method = type(module).forward
            if isinstance(method, FunctionType) and _ROTARY in method.__code__.co_names:
                if type(module) not in changed:
                    changed[type(module)] = _with_rotary(method, operations)
                if (forward := changed[type(module)]) is not None:
                    module.forward = MethodType(forward, module)


_ROTARY = "apply_rotary_pos_emb"
"""What Transformers' models call the function."""


def _with_rotary(method: FunctionType, operations: Operations) -> FunctionType | None:
    """`method` with the kernel in place of the function; None unless they give the same on random numbers."""
    function: Any = method.__globals__.get(_ROTARY)
    draw = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(1, *shape, generator=draw) for shape in ((4, 3, 64), (2, 3, 64), (3, 64), (3, 64)))
    try:
        want, got = function(q, k, cos, sin), operations.rotary(q, k, cos, sin)
        if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(want, got, strict=True)):
            return None
    except Exception:  # it is something else
        return None

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = None if args or kwargs else operations.turned(q, k, cos, sin)
        return plain or function(q, k, cos, sin, *args, **kwargs)

    space = {**method.__globals__, _ROTARY: rotary}
    made = FunctionType(method.__code__, space, method.__name__, method.__defaults__, method.__closure__)
    made.__kwdefaults__ = method.__kwdefaults__
    return made


def _exchange(module: nn.Module, forward: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype) -> None:
    """Let `module` call `forward` if it takes one tensor [..., width] and gives what `forward` gives."""
    if len(inspect.signature(module.forward).parameters) != 1:
        return
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        with torch.inference_mode():
            want, got = module(x), forward(x)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # it is something else
        return
    if same_result(got, want):
        module.forward = forward
