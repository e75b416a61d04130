"""Parameters that keep a part of a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from engine.model.load import Cut, frozen


def cut_parameter(module: nn.Module, name: str, dim: int, spans: list[tuple[int, int]]) -> None:
    """Keep `spans` along `dim` of a parameter on `meta`, where `module` has it."""
    old = module._parameters.get(name)
    if old is None:
        return
    shape = list(old.shape)
    shape[dim] = sum(end - begin for begin, end in spans)
    new: Any = frozen(torch.empty(shape, dtype=old.dtype, device="meta"))
    new.cut = Cut(tuple(old.shape), dim, tuple(spans))
    module._parameters[name] = new


def cut_away(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Keep nothing of the parameters on `meta` of `modules`, but of those that others share."""
    away = {id(part) for module in modules for part in module.modules()}
    kept = {id(p) for part in model.modules() if id(part) not in away for p in part._parameters.values()}
    made: dict[int, Any] = {}
    for part in model.modules():
        for name, old in part._parameters.items():
            if old is None or id(part) not in away or id(old) in kept:
                continue
            if id(old) not in made:
                made[id(old)] = new = frozen(old.new_empty(0, *old.shape[1:]))
                whole = old.cut.shape if hasattr(old, "cut") else tuple(old.shape)
                new.cut = Cut(whole, 0, ())  # type: ignore[attr-defined]
            part._parameters[name] = made[id(old)]
