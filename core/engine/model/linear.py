"""Linear layers: siblings that read the same tensor become one product, and the platform may keep weights its own way.

    q_proj, k_proj, v_proj   ->   one weight   | q rows | k rows | v rows |

The first sibling that is called computes all of it, and each takes its slice; the modelling code is untouched. Siblings
keep their names and hold views of the one weight, so a checkpoint streams straight into it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from engine.interfaces import LinearMethod
from engine.model.probe import Observations


class Projection(nn.Module):
    """One matrix product for one or more linear layers that read the same tensor.

    Attributes:
        members: the layers, in the order of their rows.
        weight: [rows of all members, in]; `bias`: the same rows, or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        self.weight, self.bias = linears[0].weight, linears[0].bias
        self.members = [Member(self, index, linear) for index, linear in enumerate(linears)]
        self._method: LinearMethod | None = None
        self._packed: object = None
        self._input: Tensor | None = None
        self._slices: list[Tensor | None] = []

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., rows of all members]."""
        if self._method is not None:
            return self._method.apply(x, self._packed)
        return F.linear(x, self.weight, self.bias)

    def slice(self, x: Tensor, index: int) -> Tensor:
        """What member `index` makes of x; computed once for all members that are called with the same tensor."""
        if len(self.sizes) == 1:
            return self(x)
        if self._input is not x or self._slices[index] is None:
            self._slices = list(self(x).split(self.sizes, -1))
        result, self._slices[index] = self._slices[index], None
        self._input = None if all(rest is None for rest in self._slices) else x
        return result

    def store(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take storage [rows, in] and [rows]; the members view their part of it."""
        self.weight, self.bias = _frozen(weight), None if bias is None else _frozen(bias)
        begin = 0
        for member in self.members:
            member.weight = _frozen(weight.narrow(0, begin, member.out_features))
            member.bias = None if bias is None else _frozen(bias.narrow(0, begin, member.out_features))
            begin += member.out_features

    def pack(self, method: LinearMethod) -> None:
        """Give the loaded weight to `method`. Only shapes and dtypes stay behind, for code that asks for them."""
        self._packed = method.pack(self.weight.data, None if self.bias is None else self.bias.data)
        self._method = method
        self.store(self.weight.data.to("meta"), None if self.bias is None else self.bias.data.to("meta"))


class Member(nn.Linear):
    """Stands in the model where a linear layer stood, and takes its rows of a `Projection`."""

    def __init__(self, projection: Projection, index: int, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.index = index
        self.__dict__["projection"] = projection  # not a submodule: its parameters are the members'

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        return self.projection.slice(x, self.index)  # type: ignore[no-any-return]


def fuse(model: nn.Module, seen: Observations, *, all_linears: bool) -> list[Projection]:
    """Replace linear layers by members of projections, and return these.

    Siblings are fused where they were always called with the same, unchanged tensor, agree in dtype and in having a
    bias, and share their parameters with nothing else.

    Args:
        model: on `meta`.
        seen: the observations of a probe.
        all_linears: also wrap layers that stand alone, for a platform that packs weights.
    """
    users: defaultdict[int, int] = defaultdict(int)
    for _, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)] += 1
    projections = []
    for parent in list(model.modules()):
        groups: defaultdict[object, list[tuple[str, nn.Linear]]] = defaultdict(list)
        for name, child in parent.named_children():
            if type(child) is nn.Linear and users[id(child.weight)] == 1:
                inputs = tuple((id(x), version) for x, version in seen.linears.get(child, ()))
                alike = (inputs or name, child.in_features, child.weight.dtype, child.bias is None)
                groups[alike].append((name, child))
        for group in groups.values():
            if len(group) > 1 or all_linears:
                projection = Projection([child for _, child in group])
                for (name, _), member in zip(group, projection.members, strict=True):
                    setattr(parent, name, member)
                projections.append(projection)
    return projections


def pack(projections: Iterable[Projection], method: LinearMethod) -> None:
    """Hand every projection's weight to the platform."""
    for projection in projections:
        projection.pack(method)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
