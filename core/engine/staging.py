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
    """One array of the step: views of the buffers that `Staging` filled, made when they are asked for."""

    __slots__ = ("_begin", "_buffers", "_device", "array")

    def __init__(self, buffers: _Buffers, begin: int, array: np.ndarray[Any, Any]) -> None:
        self._buffers, self._begin = buffers, begin
        self.array = array
        self._device: Tensor | None = None

    @property
    def host(self) -> Tensor:
        """In host memory, readable at once; `array` is the same for numpy."""
        return torch.from_numpy(self.array)

    @property
    def device(self) -> Tensor:
        """On the device, with the data once `Staging.upload` is done."""
        if self._device is None:
            array, target = self.array, self._buffers.targets[self.array.dtype]
            begin = self._begin // array.itemsize
            self._device = target[begin : begin + array.size]
            if array.ndim != 1:
                self._device = self._device.view(array.shape)
        return self._device


class _Buffers:
    """The memory of one size; steps that were staged before it grew keep the old one."""

    def __init__(self, device: Device, capacity: int) -> None:
        self.hosts = [device.host_buffer((capacity,), torch.uint8) for _ in range(2)]
        self.arrays = [host.numpy() for host in self.hosts]
        self.target = torch.empty(capacity, dtype=torch.uint8, device=device.torch_device)
        self.targets = {dtype: self.target.view(kind) for dtype, kind in _DTYPES.items()}


class Staging:
    """Collects arrays with `add`, then copies them all with one `upload`; `begin` starts the next step.

    Attributes:
        moved: how often the device's buffer has been replaced by a larger one at another address.
    """

    def __init__(self, device: Device, capacity: int = 1 << 20) -> None:
        self.moved = 0
        self._device = device
        self._copied = [device.event(), device.event()]
        self._turn = 0
        self._used = self._sent = 0
        self._buffers = _Buffers(device, -(-capacity // _ALIGN) * _ALIGN)

    def begin(self, nbytes: int) -> None:
        """Start a step that needs at most `nbytes`, alignment apart; waits only if the device is two steps behind."""
        self._turn ^= 1
        self._used = self._sent = 0
        needed = (-(-nbytes // _ALIGN) + 64) * _ALIGN
        if needed > self._buffers.target.numel():
            self._device.synchronize()
            self._buffers = _Buffers(self._device, 2 * needed)
            self.moved += 1
        self._copied[self._turn].synchronize()

    def add(self, array: np.ndarray[Any, Any]) -> Staged:
        """Stage a copy of `array` (int32, int64, float32 or bool)."""
        begin, end = self._used, self._used + array.nbytes
        self._used = -(-end // _ALIGN) * _ALIGN
        host = self._buffers.arrays[self._turn][begin:end].view(array.dtype).reshape(array.shape)
        host[...] = array
        return Staged(self._buffers, begin, host)

    def upload(self) -> None:
        """Copy everything staged since the last `upload` or `begin` to the device, without waiting."""
        buffers, new = self._buffers, slice(self._sent, self._used)
        buffers.target[new].copy_(buffers.hosts[self._turn][new], non_blocking=True)
        self._sent = self._used
        self._copied[self._turn].record()
