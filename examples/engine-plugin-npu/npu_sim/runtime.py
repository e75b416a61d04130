"""``torch.npu``: the device's module, with torch's usual names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from npu_sim import driver

_sim = torch.ops.npu_sim
_accelerator = torch.accelerator

Stream = torch.Stream
Event = torch.Event
Graph = torch.accelerator.Graph
empty_cache = _accelerator.empty_cache
memory_allocated = _accelerator.memory_allocated
max_memory_allocated = _accelerator.max_memory_allocated
memory_reserved = _accelerator.memory_reserved
max_memory_reserved = _accelerator.max_memory_reserved
memory_stats = _accelerator.memory_stats
reset_peak_memory_stats = _accelerator.reset_peak_memory_stats
mem_get_info = _accelerator.get_memory_info
current_device = _accelerator.current_device_index
set_device = _accelerator.set_device_index
current_stream = _accelerator.current_stream
set_stream = _accelerator.set_stream
synchronize = _accelerator.synchronize
device_count = driver.device_count


@dataclass(frozen=True)
class Properties:
    """What a device is."""

    name: str
    generation: int
    total_memory: int


class device:  # noqa: N801, torch's name for it
    """Context manager that makes a device current."""

    def __init__(self, device: Any) -> None:
        self._index = device if isinstance(device, int) else torch.device(device).index
        self._before = -1

    def __enter__(self) -> None:
        self._before = current_device()
        if self._index is not None:
            set_device(self._index)

    def __exit__(self, *error: object) -> None:
        set_device(self._before)


def is_available() -> bool:
    """Whether there is a device."""
    return device_count() > 0


def is_initialized() -> bool:
    """Whether this process has used a device."""
    return _loaded() and bool(_sim.initialized())


def _is_in_bad_fork() -> bool:
    return _loaded() and bool(_sim.forked())


def _loaded() -> bool:
    return hasattr(_sim, "initialized")


def get_device_properties(device: Any = None) -> Properties:
    """Name, generation and memory; all devices are alike."""
    return Properties(f"NPU-{driver.generation()}", driver.generation(), driver.total_memory())


def is_bf16_supported() -> bool:
    """From the second generation on."""
    return driver.generation() >= 2


def get_amp_supported_dtype() -> list[torch.dtype]:
    """For `torch.autocast`."""
    return [torch.float16, torch.bfloat16] if is_bf16_supported() else [torch.float16]


@contextmanager
def stream(stream: torch.Stream) -> Iterator[None]:
    """Make a stream current."""
    before = current_stream(stream.device)
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)


def manual_seed(seed: int) -> None:
    """Seed the default generators."""
    if _loaded():
        _sim.seed(seed)


manual_seed_all = manual_seed


def get_rng_state(device: Any = "npu") -> Tensor:
    """State of the default generator of the current device."""
    return _sim.get_rng_state()  # type: ignore[no-any-return]


def set_rng_state(state: Tensor, device: Any = "npu") -> None:
    """Set the state of the default generator of the current device."""
    _sim.set_rng_state(state)


def set_sync_debug_mode(mode: Literal["default", "warn", "error"]) -> None:
    """Warn, or raise, where an operator makes the host wait for the device."""
    _sim.sync_debug_mode(("default", "warn", "error").index(mode))


def launches() -> int:
    """Operators and copies launched so far."""
    return int(_sim.launches())


def waits() -> int:
    """How often so far an operator or a copy made the host wait."""
    return int(_sim.waits())


@contextmanager
def held() -> Iterator[None]:
    """Hold the current stream back: what is launched inside is not done before the block ends."""
    gate = _sim.close_gate()
    try:
        yield
    finally:
        _sim.open_gate(gate)


@contextmanager
def slowed(microseconds: int) -> Iterator[None]:
    """Let every launch take so much longer, so that what should have waited for it shows."""
    before = _sim.delay(microseconds)
    try:
        yield
    finally:
        _sim.delay(before)
