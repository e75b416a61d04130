"""Linear layers whose weights are integers: rounded as they are read, or read as they are stored.

    rounded    tensor -> sink -> once all siblings are there: the method rounds and packs them, and the floats go
    stored     the format's tensors, parameters of each sibling -> pack: decoded, joined, packed, and they go too

So never more floats than those of a few layers exist. A platform's `LinearMethod` for the scheme keeps the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from engine.extensions.projections.layers import Projection
from engine.interfaces import LinearMethod, QuantScheme, QuantWeight
from engine.model.load import frozen


class Recipe(Protocol):
    """How a linear layer, whose attribute ``quant`` this is, is quantised."""

    scheme: QuantScheme
    dtype: torch.dtype
    """Of the weight that it stands for."""
    decode: Callable[[nn.Module], QuantWeight] | None
    """The integers, from the layer's own parameters, all but the bias; None for a float weight that is rounded."""


class QuantProjection(Projection):
    """A projection whose members have recipes of one scheme."""

    def __init__(self, linears: Sequence[nn.Linear], method: LinearMethod) -> None:
        super().__init__(linears, method)
        self._recipes: list[Recipe] = [linear.quant for linear in linears]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """See `Projection.forward`."""
        if self.packed is None:
            self.pack(None)
        assert self.method is not None
        y = self.method.apply(x, self.packed)
        return y if self.bias is None else y + self.bias

    def allocate(self, device: torch.device) -> None:
        """Make storage for biases; float weights are waited for, and stored tensors are parameters like others."""
        if self.bias is not None:
            self._share_bias(self.bias.new_empty(sum(self._sizes), device=device))
        self._await((i for i, recipe in enumerate(self._recipes) if recipe.decode is None), device)

    def pack(self, method: LinearMethod | None) -> None:
        """Give stored weights to the scheme's method. Biases stay: ranks may still settle who adds them."""
        if self.packed is not None:
            return
        assert self.method is not None
        decoded = [r.decode(m) for r, m in zip(self._recipes, self.members, strict=True) if r.decode is not None]
        self.packed = self.method.pack_quantized(_joined(decoded), None)
        self._leave(sum(p.nbytes for m in self.members for name, p in m.named_parameters() if name != "bias"))

    def _all_arrived(self) -> None:
        weights, rows, width = self._taken(), sum(self._sizes), self.members[0].in_features
        assert self.method is not None
        self.packed = self.method.pack_joined(weights, None)
        groups = 1 if (size := self._recipes[0].scheme.group_size) is None else -(-width // size)
        scales = rows * groups * weights[0].itemsize
        self._leave(rows * width * self._recipes[0].scheme.bits // 8 + scales)

    def _leave(self, nbytes: int) -> None:
        """Leave shapes and dtypes behind, and one parameter of the size that the weights have now."""
        for recipe, member in zip(self._recipes, self.members, strict=True):
            for name in member._parameters.keys() - {"bias"}:
                del member._parameters[name]
            shape = member.out_features, member.in_features
            member.__dict__["weight"] = torch.empty(shape, dtype=recipe.dtype, device="meta")
        self.weight = self.members[0].weight
        self.members[0].quantised = frozen(torch.empty(nbytes, dtype=torch.uint8, device="meta"))


def _joined(weights: Sequence[QuantWeight]) -> QuantWeight:
    """Rows one after the other; where some have zeros, all get them."""
    if len(weights) == 1:
        return weights[0]
    zeros = None
    if any(w.zeros is not None for w in weights):
        zeros = torch.cat(
            [torch.zeros_like(w.scales, dtype=torch.int8) if w.zeros is None else w.zeros for w in weights]
        )
    return QuantWeight(torch.cat([w.values for w in weights]), torch.cat([w.scales for w in weights]), zeros)
