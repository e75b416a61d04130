"""A device and its memory, as the engine uses them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a device's work."""

    def record(self) -> None:
        """Mark the current stream's work up to now."""

    def synchronize(self) -> None:
        """Wait on the host until the marked work is done."""

    def query(self) -> bool:
        """Whether the marked work is done."""


@dataclass(frozen=True)
class MemoryInfo:
    """Bytes of a device's memory that are free and that there are, seen by this process."""

    free: int
    total: int


class Device(ABC):
    """One device of the platform."""

    torch_device: torch.device

    @abstractmethod
    def activate(self) -> None:
        """Make this the calling thread's current device."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all launched work is done."""

    @abstractmethod
    def event(self) -> Event:
        """A new event that the host can wait for."""

    @abstractmethod
    def side_stream(self) -> AbstractContextManager[None]:
        """Work launched inside runs on a second stream that starts after, and is joined by, the current one."""

    @abstractmethod
    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeroed host memory from which copies to the device are fastest (page-locked where that exists)."""

    @abstractmethod
    def memory_info(self) -> MemoryInfo:
        """Free and total memory now."""


class MemoryManager(ABC):
    """What of the device's memory the engine may have."""

    def expect(self, nbytes: int) -> None:  # noqa: B027
        """Weights of about so many bytes, kept as stored, come in seconds: what takes long may begin on a thread."""

    @abstractmethod
    def kv_budget(self, fraction: float) -> int:
        """Bytes left for the KV cache when the process may take `fraction` of the device, weights being loaded."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Tensor:
        """Zeroed memory for the KV cache: uint8 [nbytes]. Where there is not enough, torch's error or an OSError."""

    @abstractmethod
    def peak(self) -> AbstractContextManager[list[int]]:
        """Measures: on exit the list holds the extra bytes that the block's work needed at its peak."""

    @abstractmethod
    def release(self) -> None:
        """Hand cached, unused memory back to the device, and what garbage holds: a dropped engine may be a cycle."""
