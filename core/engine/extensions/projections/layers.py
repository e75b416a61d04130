"""Linear layers: siblings that read the same tensor become one product, and the platform may keep weights its own way.

    q_proj, k_proj, v_proj   ->   one weight   | q rows | k rows | v rows |

The first sibling that is called computes all of it, and each takes its slice; the modelling code is untouched. Siblings
keep their names and hold views of the one weight, so a checkpoint streams straight into it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.interfaces import LinearMethod
from engine.model.load import frozen


class Projection:
    """One matrix product for one or more linear layers, its `members`, that read the same tensor."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.weight: Tensor = linears[0].weight  # [rows of all members, in]
        self.bias: Tensor | None = linears[0].bias  # the same rows
        self.members = [Member(self, index, linear) for index, linear in enumerate(linears)]
        self._sizes = [linear.out_features for linear in linears]
        self._method: LinearMethod | None = None
        self._packed: object = None
        self._input: Tensor | None = None
        self._slices: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., rows of all members]."""
        if self._method is not None:
            return self._method.apply(x, self._packed)
        return F.linear(x, self.weight, self.bias)

    def slice(self, x: Tensor, index: int) -> Tensor:
        """What member `index` makes of x; computed once for all members that are called with the same tensor."""
        if len(self._sizes) == 1:
            return self.forward(x)
        if self._input is not x or index not in self._slices:
            self._slices = dict(enumerate(self.forward(x).split(self._sizes, -1)))
        result = self._slices.pop(index)
        self._input = x if self._slices else None
        return result

    def allocate(self, device: torch.device) -> None:
        """Make storage for all rows, not initialised."""
        rows = sum(self._sizes)
        weight = self.weight.new_empty(rows, self.weight.shape[1], device=device)
        self._store(weight, None if self.bias is None else self.bias.new_empty(rows, device=device))

    def pack(self, method: LinearMethod | None) -> None:
        """Give the loaded weight to `method`. Only shapes and dtypes stay behind, for code that asks for them."""
        if method is None:
            return
        bias = None if self.bias is None else self.bias.data
        self._packed, self._method = method.pack(self.weight.data, bias), method
        self._store(self.weight.data.to("meta"), None if bias is None else bias.to("meta"))

    def _store(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = frozen(weight), None if bias is None else frozen(bias)
        begin = 0
        for member in self.members:
            member.weight = frozen(weight.narrow(0, begin, member.out_features))
            if bias is not None:
                member.bias = frozen(bias.narrow(0, begin, member.out_features))
            begin += member.out_features


class Member(nn.Linear):
    """Stands in the model where a linear layer stood, and takes its rows of a `Projection`."""

    def __init__(self, projection: Projection, index: int, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._parameters |= linear._parameters  # a quantised layer may have others
        self.projection, self.index = projection, index
        self._forward_hooks, self._forward_pre_hooks = linear._forward_hooks, linear._forward_pre_hooks

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., in] to [..., out]."""
        return self.projection.slice(input, self.index)
