"""What goes from a device to the host while a piece of code runs, as far as torch's dispatcher sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ASKS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "unique_dim", "masked_select"}
"""Operators whose result, or its size, the host has to know."""


class Watch(TorchDispatchMode):
    """Notes the operators that bring something from `device` to the host.

    Attributes:
        moved: names of those that copied floating-point data: what should be computed on the device.
        waited: names of those that made the host wait for anything else.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._type = device.type
        self.moved: list[str] = []
        self.waited: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        if self._type == "cpu" or not any(x.device.type == self._type for x in given):
            return result
        if name in _ASKS:
            self.waited.append(name)
        elif isinstance(result, Tensor) and result.device.type == "cpu":
            (self.moved if result.is_floating_point() and result.dim() else self.waited).append(name)
        return result
