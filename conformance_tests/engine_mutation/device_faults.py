"""Devices and memory: threads, errors, buffers, figures; and streams and events, on a device that really runs late."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine_mutation.catalogue import fault
from engine_mutation.host import HostPlatform
from engine_sdk import Device, Event, HostEvent, MemoryInfo, MemoryManager, TorchDevice, TorchMemory

_BUFFERS = "test_device.py::test_host_buffers"
_MEMORY = "test_device.py::test_memory_info"


@fault("L0", "test_device.py::test_same_objects")
class DeviceMadeEachTime(HostPlatform):
    """Every call makes another device, so that streams and events of two are mixed."""

    def device(self) -> Device:
        return TorchDevice("cpu")


@fault("L0", "test_device.py::test_same_objects")
class MemoryMadeEachTime(HostPlatform):
    """Every call makes another memory manager."""

    def memory(self) -> MemoryManager:
        return TorchMemory(self.device())


@fault("L0", "test_device.py::test_threads")
class CurrentInOneThread(TorchDevice):
    """Only the thread that activated it first has the device as its current one."""

    def activate(self) -> None:
        self.__dict__.setdefault("_thread", threading.get_ident())

    def event(self) -> Event:
        if threading.get_ident() != self._thread:  # type: ignore[attr-defined]
            raise RuntimeError("no current device")
        return super().event()


class _Sticky(TorchDispatchMode):
    """Once an operator has failed, all of the process fail, as on a device whose context is lost."""

    dead = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.dead:
            raise RuntimeError("the device's context is lost")
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError:
            self.dead = True
            raise


@fault("L0", "test_device.py::test_works_after_out_of_memory")
class LostAfterOutOfMemory(TorchDevice):
    """After a failed allocation nothing works any more."""

    def activate(self) -> None:
        mode: Any = _Sticky
        mode().__enter__()


@fault("L0", "test_device.py::test_cache_memory")
class CacheMemoryNotZeroed(TorchMemory):
    """A cache begins with what the last one left."""

    def allocate(self, nbytes: int) -> Tensor:
        return super().allocate(nbytes).fill_(7)


@fault("L0", "test_device.py::test_cache_memory")
class CacheMemoryMadeOnce(TorchMemory):
    """Caches of one size are one."""

    def allocate(self, nbytes: int) -> Tensor:
        made: dict[int, Tensor] = self.__dict__.setdefault("_made", {})
        return made.setdefault(nbytes, super().allocate(nbytes))


@fault("L0", _BUFFERS)
class HostBufferNotZeroed(TorchDevice):
    """Host buffers hold what was there before."""

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return super().host_buffer(shape, dtype).fill_(1)


@fault("L0", _BUFFERS)
class HostBufferShared(TorchDevice):
    """Host buffers of one shape are one buffer."""

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        kept: dict[Any, Tensor] = self.__dict__.setdefault("_buffers", {})
        return kept.setdefault((shape, dtype), super().host_buffer(shape, dtype))


@fault("L0", _BUFFERS)
class HostBufferOfBytes(TorchDevice):
    """Host buffers of integers are 32 bits wide, whatever was asked for."""

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return super().host_buffer(shape, torch.int32 if dtype is torch.int64 else dtype)


@fault("L0", _MEMORY)
class MemoryInMebibytes(TorchDevice):
    """Figures of memory are mebibytes instead of bytes."""

    def memory_info(self) -> MemoryInfo:
        info = super().memory_info()
        return MemoryInfo(info.free >> 20, info.total >> 20)


@fault("L0", _MEMORY)
class MemoryFreeAndTotalSwapped(TorchDevice):
    """Free and total change places."""

    def memory_info(self) -> MemoryInfo:
        info = super().memory_info()
        return MemoryInfo(info.total, info.free)


@fault("L0", "test_device.py::test_free_memory_shrinks")
class FreeMemoryNeverChanges(TorchDevice):
    """Free memory is what was free at the start."""

    def memory_info(self) -> MemoryInfo:
        made: MemoryInfo = self.__dict__.setdefault("_info", super().memory_info())
        return made


@fault("L0", "test_device.py::test_kv_budget")
class BudgetOfTheWholeDevice(TorchMemory):
    """The budget is a share of all memory, what is taken already included."""

    def kv_budget(self, fraction: float) -> int:
        return int(self._device.memory_info().total * min(1.0, fraction * 1.3))


@fault("L0", "test_device.py::test_kv_budget")
class BudgetIgnoresTheShare(TorchMemory):
    """The budget is all that is free, whatever share was allowed."""

    def kv_budget(self, fraction: float) -> int:
        return self._device.memory_info().free


@fault("L0", "test_device.py::test_kv_budget_shrinks")
class BudgetForgetsTheWeights(TorchMemory):
    """What the process holds already is not taken off its share."""

    def _held(self) -> int:
        return 0


@fault("L0", "test_device.py::test_peak")
class PeakIsWhatRemains(TorchMemory):
    """The peak is what the work still holds at its end."""

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        before = self._held()
        found: list[int] = []
        yield found
        found.append(max(0, self._held() - before))


@fault("L0", "test_device.py::test_peak")
class PeakNeverReset(TorchMemory):
    """A second measurement begins with the first one's peak."""

    _highest = 0

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        with super().peak() as extra:
            yield extra
        self._highest = extra[0] = max(self._highest, extra[0])


@fault("L0", "test_device.py::test_same_objects")
class AnotherDeviceType(TorchDevice):
    """The device that tensors are made on is not of the platform's type."""

    def __init__(self, device_type: str, index: int = 0) -> None:
        super().__init__(device_type, index)
        self.torch_device = torch.device("meta")


class _Unready(HostEvent):
    def query(self) -> bool:
        return False


@fault("L0", "test_device.py::test_events")
class EventNeverDone(TorchDevice):
    """An event that was waited for still says that its work is not done."""

    def event(self) -> Event:
        return _Unready()


class _FreshFails(HostEvent):
    _recorded = False

    def record(self) -> None:
        self._recorded = True

    def synchronize(self) -> None:
        if not self._recorded:
            raise RuntimeError("the event was not recorded")


@fault("L0", "test_device.py::test_events")
class FreshEventFails(TorchDevice):
    """To wait for an event that was never recorded is an error."""

    def event(self) -> Event:
        return _FreshFails()
