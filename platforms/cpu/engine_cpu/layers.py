"""A decoder layer in five calls of kernels.

    qkv = norm(x) @ W  ->  heads normed and turned where they lie  ->  attention  ->  h = attended @ W + x
    h + (silu(gate) * up) @ W, gate and up = norm(h) @ W

Where a weight is none of `PackedLinear`'s own, its product is the method's that has it, and what surrounds it takes a
call each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from engine_cpu.linear import Packed, PackedLinear
from engine_cpu.operations import Operations
from engine_sdk import DecoderLayer, LayerForward, Norm, attend, exchange_layer, find_layers, hooked, projection_of


def exchange_layers(model: nn.Module, method: PackedLinear, operations: Operations) -> None:
    """Let the layers of `model` that have the structure run in five calls."""
    for layer in find_layers(model):
        exchange_layer(layer, functools.partial(_fused, layer, method, operations))


Product = Callable[[Tensor, Tensor | None], Tensor]
"""(x [1, N, in], a tensor that is added or None) to [1, N, out]."""


def _fused(layer: DecoderLayer, method: PackedLinear, operations: Operations) -> LayerForward | None:
    """The layer's forward; None where it is left as it is."""
    heads, kv_heads, width = sizes = layer.num_heads, layer.num_kv_heads, layer.head_dim
    qkv, o = _product(layer.qkv, method, operations, layer.norms[0]), _product([layer.o], method, operations)
    feed_forward = _feed_forward(layer, method, operations)
    if qkv is None or o is None or feed_forward is None:
        return None
    prepare, attention = operations.heads(*sizes, layer.head_norms), layer.attention

    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        parts = qkv(x, None).view(-1, heads + 2 * kv_heads, width)
        prepare(parts, cos, sin)
        attended = attend(attention, *parts.split((heads, kv_heads, kv_heads), 1))
        return feed_forward(o(attended.view(1, -1, heads * width), x))

    return forward


def _feed_forward(
    layer: DecoderLayer, method: PackedLinear, operations: Operations
) -> Callable[[Tensor], Tensor] | None:
    """From the sum that attention ends with to that of the layer; None where it is left as it is."""
    norm = layer.norms[1]
    first, second = _packed(layer.gate_up, norm), _packed([layer.down], norm)
    if first is not None and second is not None and first.gates:
        return lambda x: method.feed_forward(x, norm, first, second)
    gate_up, down = _product(layer.gate_up, method, operations, norm), _product([layer.down], method, operations)
    if gate_up is None or down is None:
        return None
    return lambda x: down(operations.silu_and_mul(*gate_up(x, None).chunk(2, -1)), x)


def _product(
    linears: Sequence[nn.Linear], method: PackedLinear, operations: Operations, norm: Norm | None = None
) -> Product | None:
    """The product of all `linears`, after a norm; None where they are not one."""
    if (packed := _packed(linears, norm)) is not None:
        return lambda x, added: method.multiply(x, packed, norm=norm, added=added)
    projection = projection_of(linears)
    if projection is None and len(linears) > 1:
        return None
    multiply = linears[0] if projection is None or len(linears) == 1 else projection.forward

    def product(x: Tensor, added: Tensor | None) -> Tensor:
        y: Tensor = multiply(x if norm is None else operations.rms_norm(x, norm.weight, norm.eps))
        return y if added is None else added + y

    return product


def _packed(linears: Sequence[nn.Linear], norm: Norm | None) -> Packed | None:
    """The weight of all `linears` where the kernel multiplies with it, a norm before included."""
    projection = projection_of(linears)
    packed = None if projection is None else projection.packed
    if not isinstance(packed, Packed) or packed.product is None or any(map(hooked, linears)):
        return None
    return packed if norm is None or norm.weight.dtype == torch.bfloat16 else None
