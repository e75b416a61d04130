"""Which linear layers become one product."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from torch import nn

from engine.errors import UnsupportedCapability
from engine.extensions.projections.layers import Projection
from engine.extensions.projections.quantised import QuantProjection, Recipe
from engine.interfaces import LinearMethod, QuantScheme
from engine.model.probe import Observations

Linear = Callable[[QuantScheme | None], LinearMethod | None]
"""`Platform.linear`."""


def fuse(model: nn.Module, seen: Observations, linear: Linear) -> list[Projection]:
    """Replace linear layers by members of projections, and return these.

    Siblings are fused where they were always called with the same, unchanged tensor, agree in dtype, scheme and having
    a bias, and share their parameters with nothing else.

    `model` is on `meta`. Where `linear`, the platform's, packs weights, and where a layer is quantised, those that
    stand alone become members too. Layers that the probe did not see stay as they are.
    """
    method = linear(None)
    users = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    projections = []
    for parent in list(model.modules()):
        groups: defaultdict[object, list[tuple[str, nn.Linear]]] = defaultdict(list)
        for name, child in parent.named_children():
            if child not in seen.linears or any(users[id(p)] > 1 for p in child.parameters()):
                continue
            assert isinstance(child, nn.Linear)
            inputs = tuple((id(x), version) for x, version in seen.linears[child])
            recipe: Recipe | None = getattr(child, "quant", None)
            kind = None if recipe is None else (recipe.scheme, recipe.decode is None)
            groups[inputs, child.in_features, child.weight.dtype, child.bias is None, kind].append((name, child))
        for group in groups.values():
            linears = [child for _, child in group]
            recipe = getattr(linears[0], "quant", None)
            if len(group) > 1 or method is not None or recipe is not None:
                projection = (
                    Projection(linears, method) if recipe is None else _quantised(linears, recipe.scheme, linear)
                )
                for (name, _), member in zip(group, projection.members, strict=True):
                    setattr(parent, name, member)
                projections.append(projection)
    return projections


def _quantised(linears: Sequence[nn.Linear], scheme: QuantScheme, linear: Linear) -> QuantProjection:
    method = linear(scheme)
    if method is None:
        raise UnsupportedCapability("quant_schemes", scheme, "the platform has no method for it; leave the option out")
    return QuantProjection(linears, method)
