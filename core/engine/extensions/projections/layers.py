"""Linear layers: siblings that read the same tensor become one product, and the platform may keep weights its own way.

    q_proj, k_proj, v_proj   ->   one weight   | q rows | k rows | v rows |

The first sibling that is called computes all of it, and each takes its slice; the modelling code is untouched. Siblings
keep their names and hold views of the one weight, so a checkpoint streams straight into it; where the platform packs
weights they hold shapes only, and what was read goes straight to it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.interfaces import LinearMethod
from engine.model.load import frozen


class Projection:
    """One matrix product for one or more linear layers, its `members`, that read the same tensor.

    Args:
        linears: the layers, on `meta`.
        method: the platform's, where it keeps weights its own way. Then these have no storage here: they are packed as
            soon as all have been read, so that only one projection's are there twice at a time.
    """

    def __init__(self, linears: Sequence[nn.Linear], method: LinearMethod | None = None) -> None:
        self.weight: Tensor = linears[0].weight  # [rows of all members, in], without a method
        self.bias: Tensor | None = linears[0].bias  # the same rows
        self.members = [Member(self, index, linear) for index, linear in enumerate(linears)]
        self._sizes = [linear.out_features for linear in linears]
        self.method = method
        self.packed: object = None
        self._arrived: dict[int, Tensor] = {}
        self._lock = threading.Lock()
        self._input: Tensor | None = None
        self._slices: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., rows of all members]."""
        if self.method is None:
            return F.linear(x, self.weight, self.bias)
        if self.packed is None:  # another swap tries its part of the model before all are packed
            self.pack(self.method)
        return self.method.apply(x, self.packed)

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
        """Make storage for all rows, not initialised; a method waits for the weights."""
        if self.bias is not None:
            self._share_bias(self.bias.new_empty(sum(self._sizes), device=device))
        if self.method is not None:
            self._await(range(len(self.members)), device)
            return
        self.weight = frozen(self.weight.new_empty(sum(self._sizes), self.weight.shape[1], device=device))
        for member, part in zip(self.members, self.weight.split(self._sizes), strict=True):
            member.weight = frozen(part)

    def pack(self, method: LinearMethod | None) -> None:
        """Give weights that waited for their bias to the method, and leave its shape behind, for code that asks."""
        if self._arrived:
            assert self.method is not None
            self.packed = self.method.pack_joined(self._taken(), None if self.bias is None else self.bias.data)
            if self.bias is not None:
                self._share_bias(self.bias.data.to("meta"))

    def _await(self, indices: Iterable[int], device: torch.device) -> None:
        """Have the weights of some members brought as they are read."""
        for index in indices:
            weight: Any = self.members[index].weight
            weight.sink = lambda tensor, index=index: self._take(index, tensor.to(device))

    def _take(self, index: int, tensor: Tensor) -> None:
        with self._lock:
            self._arrived[index] = tensor
            if len(self._arrived) < len(self.members):
                return
        self._all_arrived()

    def _all_arrived(self) -> None:
        if self.bias is None:  # else ranks may still settle who adds it
            self.pack(self.method)

    def _taken(self) -> list[Tensor]:
        """The weights that arrived, which whoever called keeps from now on."""
        return [self._arrived.pop(index) for index in range(len(self.members))]

    def _share_bias(self, bias: Tensor) -> None:
        self.bias = frozen(bias)
        for member, part in zip(self.members, bias.split(self._sizes), strict=True):
            member.bias = frozen(part)


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
