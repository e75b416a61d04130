"""Host arrays of a step, packed into one page-locked buffer and copied to the device at once.

host 0   | token ids | positions | slots | ... | temperatures | ... |      filled while the device may still be
host 1   | ...                                                      |      copying from the other one
device   | one address for ever, so captured graphs can read it     |
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.interfaces import Device

_ALIGN = 64
_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.bool_): torch.bool,
}


class Staged:
    """One array of the step. `host` is readable at once; `device` holds the data after `Staging.upload`."""

    __slots__ = ("device", "host")

    def __init__(self, host: Tensor, device: Tensor) -> None:
        self.host = host
        self.device = device


class Staging:
    """Collects arrays with `add`, then copies them all with one `upload`; `begin` starts the next step."""

    def __init__(self, device: Device, capacity: int = 1 << 20) -> None:
        self._device = device
        self._hosts: list[Tensor] = []
        self._copied = [device.event(), device.event()]
        self._turn = 0
        self._used = 0
        self._grow(capacity)

    def _grow(self, capacity: int) -> None:
        self._device.synchronize()
        self._hosts = [self._device.host_buffer((capacity,), torch.uint8) for _ in range(2)]
        self._target = torch.empty(capacity, dtype=torch.uint8, device=self._device.torch_device)

    def begin(self, nbytes: int) -> None:
        """Start a step that needs at most `nbytes`, alignment apart; waits only if the device is two steps behind."""
        self._turn ^= 1
        self._used = 0
        if nbytes + 64 * _ALIGN > self._target.numel():
            self._grow(2 * (nbytes + 64 * _ALIGN))
        self._copied[self._turn].synchronize()

    def add(self, array: np.ndarray[Any, Any]) -> Staged:
        """Stage a copy of `array` (int32, int64, float32 or bool)."""
        dtype = _DTYPES[array.dtype]
        begin, end = self._used, self._used + array.nbytes
        self._used = -(-end // _ALIGN) * _ALIGN
        host = self._hosts[self._turn][begin:end].view(dtype).view(array.shape)
        host.numpy()[...] = array
        return Staged(host, self._target[begin:end].view(dtype).view(array.shape))

    def upload(self) -> None:
        """Copy everything staged since `begin` to the device, without waiting."""
        self._target[: self._used].copy_(self._hosts[self._turn][: self._used], non_blocking=True)
        self._copied[self._turn].record()
