"""A decoder layer in one call of ``kernels/layer.cpp``, in three where attention is not `CpuAttention`'s:

    qkv = norm(x) @ W  ->  heads normed and turned where they lie  ->  attention  ->  h = attended @ W + x
    h + (silu(gate) * up) @ W, gate and up = norm(h) @ W

Where a weight is in no order of ours, each product is a call of the method's that has it, and what surrounds it too.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine_cpu import linear, quantised
from engine_cpu.attention import DTYPES, CpuAttention
from engine_cpu.operations import Heads, Operations, angles, heads_of
from engine_sdk import (
    DecoderLayer,
    LayerForward,
    Norm,
    attend,
    attention_step,
    exchange_layer,
    find_layers,
    hooked,
    projection_of,
)


def exchange_layers(model: nn.Module, kernels: ctypes.CDLL, operations: Operations) -> None:
    """Let the layers of `model` that have the structure run in few calls."""
    for layer in find_layers(model):
        exchange_layer(layer, functools.partial(_fused, layer, kernels, operations))


class _Linear(ctypes.Structure):
    """The same as `Linear` in layer.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("product", "quantised")]


class _Norm(ctypes.Structure):
    """The same as `Norm` in layer.cpp."""

    _fields_ = [("weight", ctypes.c_void_p), ("eps", ctypes.c_float)]


class _Layer(ctypes.Structure):
    """The same as `Layer` in layer.cpp."""

    _fields_ = [
        ("qkv", _Linear),
        ("o", _Linear),
        ("gate_up", _Linear),
        ("down", _Linear),
        ("before_attention", _Norm),
        ("before_feed_forward", _Norm),
        ("heads", Heads),
        ("dtype", ctypes.c_int32),
    ]


def _whole(layer: DecoderLayer, kernels: ctypes.CDLL) -> LayerForward | None:
    """The layer's forward in calls of ``layer.cpp``; None where a part of it is none of ours."""
    norms, attention, width = layer.norms, layer.attention, layer.head_dim
    found = [_packed(layer.qkv, norms[0]), _packed([layer.o]), _packed(layer.gate_up, norms[1]), _packed([layer.down])]
    weights = [one[1] for one in found if one is not None]
    heads, head_norms = heads_of(layer.num_heads, layer.num_kv_heads, width, layer.head_norms)
    dtype, row = norms[0].weight.dtype, (layer.num_heads + 2 * layer.num_kv_heads, width)
    if len(weights) < len(found) or not weights[2].gates or type(weights[2]) is not type(weights[3]):
        return None
    if dtype not in DTYPES or any(weight.dtype != dtype for weight in (norms[1].weight, *head_norms)):
        return None
    if dtype != torch.bfloat16 and any(isinstance(weight, linear.Packed) for weight in weights):
        return None
    normed = [norm.weight.contiguous() for norm in norms]
    structure = _Layer(
        *(_Linear(*_places(weight)) for weight in weights),
        *(_Norm(weight.data_ptr(), norm.eps) for weight, norm in zip(normed, norms, strict=True)),
        *(heads, DTYPES[dtype]),
    )
    hidden = layer.down.out_features
    place, pointed_to = ctypes.addressof(structure), (structure, weights, normed, head_norms)
    before, after, whole = _calls(kernels)

    def forward(x: Tensor, cos: Tensor, sin: Tensor, _kept: object = pointed_to) -> Tensor:
        rows, threads = x.shape[1], torch.get_num_threads()
        cos, sin = angles(cos, sin, rows, width, dtype)
        if x.dtype != dtype or x.shape != (1, rows, hidden):
            raise ValueError(f"the layer takes [1, N, {hidden}] of {dtype}, and this is {list(x.shape)} of {x.dtype}")
        x = x.contiguous()
        out = torch.empty_like(x)
        states, turns = (place, x.data_ptr(), rows), (cos.data_ptr(), sin.data_ptr())
        step = attention_step(attention)
        if step is not None and isinstance(step[0], CpuAttention):
            whole(*states, out.data_ptr(), *turns, *CpuAttention.in_layer(*step[1:]), threads)
            return out
        parts = torch.empty(rows, *row, dtype=dtype)
        before(*states, parts.data_ptr(), *turns, threads)
        attended = attend(attention, *parts.split((layer.num_heads, layer.num_kv_heads, layer.num_kv_heads), 1))
        after(place, attended.data_ptr(), x.data_ptr(), rows, out.data_ptr(), threads)
        return out

    return forward


@functools.cache
def _calls(kernels: ctypes.CDLL) -> tuple[Callable[..., None], ...]:
    """What comes before attention, what comes after it, and all of a layer."""
    calls = kernels.engine_before_attention, kernels.engine_after_attention, kernels.engine_layer
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    calls[0].argtypes = [pointer, pointer, size, *[pointer] * 3, number]
    calls[1].argtypes = [*[pointer] * 3, size, pointer, number]
    calls[2].argtypes = [pointer, pointer, size, *[pointer] * 6, size, pointer, number]
    for call in calls:
        call.restype = None
    return calls


def _places(weight: linear.Packed | quantised.Packed) -> tuple[int | None, int | None]:
    if isinstance(weight, quantised.Packed):
        return None, ctypes.addressof(weight.weight)
    assert weight.product is not None
    return ctypes.addressof(weight.product), None


Product = Callable[[Tensor, Tensor | None], Tensor]
"""(x [1, N, in], a tensor that is added or None) to [1, N, out]."""


def _fused(layer: DecoderLayer, kernels: ctypes.CDLL, operations: Operations) -> LayerForward | None:
    """The layer's forward; None where it is left as it is."""
    if (whole := _whole(layer, kernels)) is not None:
        return whole
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
