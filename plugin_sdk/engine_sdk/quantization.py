"""Linear layers whose weights are integers: how they are rounded, and a method in plain torch that runs them anywhere.

Two schemes, of weights alone; activations keep their dtype:

    int8    8 bits, a scale for each output, or for each group of inputs
    int4    4 bits, likewise; two weights a byte

A vendor's fast method derives from `QuantizedLinear` and writes `pack_quantized`, `apply` and, for embeddings that
share a weight with the head, `rows`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import UnsupportedCapability
from engine.interfaces import LinearMethod, QuantScheme, QuantWeight

QUANT_SCHEMES = {"int8": 8, "int4": 4}
"""The names of the schemes, and their bits."""

_AT_ONCE = 1 << 24  # weights that are floats at a time


def require_scheme(scheme: QuantScheme) -> None:
    """Raise `UnsupportedCapability` unless `scheme` is one of `QUANT_SCHEMES`, with groups that can be."""
    if QUANT_SCHEMES.get(scheme.name) != scheme.bits:
        known = ", ".join(f"{name} of {bits} bits" for name, bits in QUANT_SCHEMES.items())
        raise UnsupportedCapability("quant_schemes", f"{scheme.name} of {scheme.bits} bits", f"there are {known}")
    if scheme.group_size is not None and scheme.group_size < 1:
        raise UnsupportedCapability("quant_schemes", f"{scheme.name} in groups of {scheme.group_size}", "use 32 or 128")


def quantise(weight: Tensor, scheme: QuantScheme) -> QuantWeight:
    """Round a weight [out, in] to the nearest values of `scheme`, without zeros; scales have the weight's dtype.

    Of 8 bits the largest weight of a group becomes 127 or -127. Of 4 it becomes -8, whatever its sign, as in
    llama.cpp's Q4_0: that uses all 16 values.

    Raises `UnsupportedCapability` where groups do not divide the inputs.
    """
    groups = _groups(weight.shape[1], scheme)
    x = (
        weight.float().unflatten(1, (groups, -1))
        if weight.numel()
        else weight.new_empty(len(weight), groups, 1).float()
    )
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True)) if scheme.bits == 4 else x.abs().amax(-1, keepdim=True)
    scales = (extreme / (-8 if scheme.bits == 4 else 127)).to(weight.dtype)
    units = scales.float()
    least = torch.finfo(units.dtype).tiny  # scales that are subnormal in fp16 are normal here
    values = (x / units.where(units.abs() >= least, torch.ones(()).to(units))).round_()
    limit = 1 << (scheme.bits - 1)
    values = values.clamp_(-limit, limit - 1).to(torch.int8).view(weight.shape)
    return QuantWeight(values, scales.squeeze(-1))


def dequantise(weight: QuantWeight, dtype: torch.dtype) -> Tensor:
    """The weight [out, in]: products in fp32, rounded once."""
    groups = weight.scales.shape[1]
    x: Tensor = weight.values.float().unflatten(1, (groups, -1))
    if weight.zeros is not None:
        x -= weight.zeros.float()[..., None]
    return (x * weight.scales.float()[..., None]).flatten(1).to(dtype)


def _groups(inputs: int, scheme: QuantScheme) -> int:
    size = scheme.group_size or inputs or 1
    if inputs % size:
        raise UnsupportedCapability(
            "quant_schemes", scheme, f"groups of {size} do not divide {inputs} inputs; take int8, which has none"
        )
    return max(1, inputs // size)


class QuantizedLinear(LinearMethod):
    """The base of methods of one scheme: float weights are rounded by `quantise`."""

    def __init__(self, scheme: QuantScheme) -> None:
        self.scheme = scheme

    def pack(self, weight: Tensor, bias: Tensor | None) -> object:
        """See `LinearMethod.pack`."""
        return self.pack_quantized(quantise(weight, self.scheme), bias)


@dataclass(frozen=True)
class _Stored:
    weight: QuantWeight  # of 4 bits: values of columns 2 i and 2 i + 1 in a byte, uint8 [out, ceil(in / 2)]
    inputs: int
    bias: Tensor | None


class TorchQuantized(QuantizedLinear):
    """Any device: weights become floats of the activation's dtype, some rows at a time, whenever they are used."""

    def pack_quantized(self, weight: QuantWeight, bias: Tensor | None) -> object:
        """See `LinearMethod.pack_quantized`."""
        inputs, values = weight.values.shape[1], weight.values
        if self.scheme.bits == 4:
            codes = F.pad(values, (0, inputs % 2)).view(torch.uint8) & 15
            values = codes[:, ::2] | codes[:, 1::2] << 4
        return _Stored(QuantWeight(values, weight.scales, weight.zeros), inputs, bias)

    def apply(self, x: Tensor, packed: object) -> Tensor:
        """See `LinearMethod.apply`."""
        assert isinstance(packed, _Stored)
        outputs = packed.weight.values.shape[0]
        step = max(1, _AT_ONCE // max(1, packed.inputs))
        parts = [
            F.linear(x, self._some(packed, slice(begin, begin + step), x.dtype)) for begin in range(0, outputs, step)
        ]
        y = torch.cat(parts, -1) if len(parts) > 1 else parts[0] if parts else x.new_empty(*x.shape[:-1], 0)
        return y if packed.bias is None else y + packed.bias

    def rows(self, ids: Tensor, packed: object) -> Tensor:
        """See `LinearMethod.rows`."""
        assert isinstance(packed, _Stored)
        return self._some(packed, ids.flatten(), packed.weight.scales.dtype).view(*ids.shape, packed.inputs)

    def _some(self, packed: _Stored, which: slice | Tensor, dtype: torch.dtype) -> Tensor:
        w = packed.weight
        values = w.values[which]
        if self.scheme.bits == 4:
            pair = torch.stack((values << 4, values), -1).view(torch.int8) >> 4
            values = pair.flatten(1)[:, : packed.inputs]
        return dequantise(QuantWeight(values, w.scales[which], None if w.zeros is None else w.zeros[which]), dtype)
