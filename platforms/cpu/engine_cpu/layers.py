"""A decoder layer in five calls of kernels.

    qkv = norm(x) @ W  ->  heads normed and turned where they lie  ->  attention  ->  h = attended @ W + x
    h + (silu(gate) * up) @ W, gate and up = norm(h) @ W

Weights of 4 and 8 bits take a sixth: the feed-forward layer's two products are one each. Where a weight is in no order
of ours, its product is the method's that has it, and what surrounds it takes a call each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from engine_cpu import linear, quantised
from engine_cpu.operations import Operations
from engine_sdk import DecoderLayer, LayerForward, Norm, attend, exchange_layer, find_layers, hooked, projection_of


def exchange_layers(model: nn.Module, operations: Operations) -> None:
    """Let the layers of `model` that have the structure run in few calls."""
    for layer in find_layers(model):
        exchange_layer(layer, functools.partial(_fused, layer, operations))


Product = Callable[[Tensor, Tensor | None], Tensor]
"""(x [1, N, in], a tensor that is added or None) to [1, N, out]."""


def _fused(layer: DecoderLayer, operations: Operations) -> LayerForward | None:
    """The layer's forward; None where it is left as it is."""
    heads, kv_heads, width = sizes = layer.num_heads, layer.num_kv_heads, layer.head_dim
    qkv, o = _product(layer.qkv, operations, layer.norms[0]), _product([layer.o], operations)
    feed_forward = _feed_forward(layer, operations)
    if qkv is None or o is None or feed_forward is None:
        return None
    prepare, attention = operations.heads(*sizes, layer.head_norms), layer.attention

    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        parts = qkv(x, None).view(-1, heads + 2 * kv_heads, width)
        prepare(parts, cos, sin)
        attended = attend(attention, *parts.split((heads, kv_heads, kv_heads), 1))
        return feed_forward(o(attended.view(1, -1, heads * width), x))

    return forward


def _feed_forward(layer: DecoderLayer, operations: Operations) -> Callable[[Tensor], Tensor] | None:
    """From the sum that attention ends with to that of the layer; None where it is left as it is."""
    norm = layer.norms[1]
    first, second = _packed(layer.gate_up, norm), _packed([layer.down])
    if first is not None and second is not None and type(first[0]) is type(second[0]) and first[1].gates:
        (method, gate_up), (_, down) = first, second
        return lambda x: method.feed_forward(x, norm, gate_up, down)
    before, after = _product(layer.gate_up, operations, norm), _product([layer.down], operations)
    if before is None or after is None:
        return None
    return lambda x: after(operations.silu_and_mul(*before(x, None).chunk(2, -1)), x)


def _product(linears: Sequence[nn.Linear], operations: Operations, norm: Norm | None = None) -> Product | None:
    """The product of all `linears`, after a norm; None where they are not one."""
    if (found := _packed(linears, norm)) is not None:
        method, packed = found
        return lambda x, added: method.multiply(x, packed, norm=norm, added=added)
    projection = projection_of(linears)
    if projection is None and len(linears) > 1:
        return None
    multiply = linears[0] if projection is None or len(linears) == 1 else projection.forward

    def product(x: Tensor, added: Tensor | None) -> Tensor:
        y: Tensor = multiply(x if norm is None else operations.rms_norm(x, norm.weight, norm.eps))
        return y if added is None else added + y

    return product


def _packed(linears: Sequence[nn.Linear], norm: Norm | None = None) -> tuple[Any, Any] | None:
    """The method and the weight of all `linears` where a kernel multiplies with it, a norm before included."""
    projection = projection_of(linears)
    if projection is None or any(map(hooked, linears)) or (norm and norm.weight.dtype != linears[0].weight.dtype):
        return None
    packed = projection.packed
    if isinstance(packed, linear.Packed):
        ours = packed.product is not None
    else:  # its biases stay with the layers
        biases = [layer.bias for layer in linears]
        ours = isinstance(packed, quantised.Packed) and packed.bias is None and not any(b is not None for b in biases)
    return (projection.method, packed) if ours else None
