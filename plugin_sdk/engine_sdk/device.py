"""A device through `torch.accelerator`, and the host as a device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.interfaces import Device, Event, MemoryInfo
from engine_sdk.memory import host_memory


class HostEvent:
    """The event of a device that has done everything when a call returns."""

    def record(self) -> None:
        """Nothing to mark."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always true."""
        return True


class DeviceEvent:
    """An event of one device, whichever is current: `torch.Event` by itself records on the current device's stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.Event(device)

    def record(self) -> None:
        """See `Event.record`."""
        self._event.record(torch.accelerator.current_stream(self._device))

    def synchronize(self) -> None:
        """See `Event.synchronize`."""
        self._event.synchronize()

    def query(self) -> bool:
        """See `Event.query`."""
        return bool(self._event.query())


class TorchDevice(Device):
    """One device that torch drives; ``"cpu"`` is the host, where every call is done when it returns."""

    def __init__(self, device_type: str, index: int = 0) -> None:
        self._host = device_type == "cpu"
        self.torch_device = torch.device(device_type) if self._host else torch.device(device_type, index)

    def activate(self) -> None:
        """See `Device.activate`."""
        if not self._host:
            torch.accelerator.set_device_index(self.torch_device.index)

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        if not self._host:
            torch.accelerator.synchronize(self.torch_device)

    def event(self) -> Event:
        """A `DeviceEvent`, or a `HostEvent`."""
        return HostEvent() if self._host else DeviceEvent(self.torch_device)

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """See `Device.side_stream`."""
        if self._host:
            yield
            return
        main, side = torch.accelerator.current_stream(self.torch_device), self._side_stream
        side.wait_stream(main)
        torch.accelerator.set_stream(side)
        try:
            yield
        finally:
            torch.accelerator.set_stream(main)
            main.wait_stream(side)

    @functools.cached_property
    def _side_stream(self) -> torch.Stream:
        return torch.Stream(self.torch_device)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `Device.host_buffer`."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self._pins)

    @functools.cached_property
    def _pins(self) -> bool:
        if self._host:
            return False
        try:
            return torch.zeros(1, pin_memory=True).is_pinned()
        except (RuntimeError, NotImplementedError):  # a backend without an allocator for page-locked memory
            return False

    def memory_info(self) -> MemoryInfo:
        """See `Device.memory_info`; the host's respects the limits of the process's control groups."""
        if self._host:
            return host_memory()
        return MemoryInfo(*torch.accelerator.get_memory_info(self.torch_device))
