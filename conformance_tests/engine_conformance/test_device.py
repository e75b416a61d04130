"""L0: the device, its memory, and what a platform must declare."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest
import torch

from engine_sdk import Capabilities, Needs, Platform

_MIB = 1 << 20


def test_declares_what_it_must(capabilities: Capabilities) -> None:
    """fp32 and a 16-bit dtype, in weights and cache; a head size and a block size; data that can be reported."""
    for dtypes in (capabilities.dtypes, capabilities.kv_dtypes):
        assert torch.float32 in dtypes
        assert dtypes & {torch.bfloat16, torch.float16}
    assert any(size in capabilities.head_dims for size in range(1, 1025))
    assert any(size in capabilities.block_sizes for size in range(1, 1025))
    json.dumps(capabilities.to_dict())
    assert capabilities.missing(Needs(dtypes=frozenset({torch.complex64})))


def test_probe_initialises_nothing(conformance_platform: Platform) -> None:
    """A probe, in a process of its own, says yes and leaves the device alone."""
    code = f"""
import torch
from engine.plugins import select_platform
candidate = select_platform({conformance_platform.name!r})
assert candidate.probe.available and candidate.probe.devices, candidate.probe
module = torch.get_device_module(candidate.platform.device_type)
assert not candidate.probe.accelerator or not module.is_initialized(), "probe() initialised the device"
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_same_objects(conformance_platform: Platform) -> None:
    """There is one device and one memory manager."""
    assert conformance_platform.device() is conformance_platform.device()
    assert conformance_platform.memory() is conformance_platform.memory()
    assert conformance_platform.device().torch_device.type == conformance_platform.device_type


def test_events(conformance_platform: Platform) -> None:
    """Once an event has been waited for, the work before it is done."""
    device = conformance_platform.device()
    x = torch.ones(512, 512, device=device.torch_device)
    for _ in range(20):
        x = x @ x / 512
    event = device.event()
    event.record()
    event.synchronize()
    assert event.query()
    fresh = device.event()
    fresh.synchronize()  # never recorded: nothing to wait for
    assert bool((x == 1).all())


def test_side_stream(conformance_platform: Platform) -> None:
    """Work on the side stream sees what came before, and what comes after sees it."""
    device = conformance_platform.device()
    x = torch.ones(1 << 20, device=device.torch_device)
    for _ in range(20):
        x.add_(1)
        with device.side_stream():
            x.mul_(2)
        x.sub_(1)
    want = 1.0
    for _ in range(20):
        want = (want + 1) * 2 - 1
    assert bool((x == want).all())


def test_host_buffers(conformance_platform: Platform) -> None:
    """Zeroed, writable through numpy, and a source of copies that do not wait."""
    device = conformance_platform.device()
    for dtype in (torch.uint8, torch.int32, torch.int64, torch.float32):
        buffer = device.host_buffer((3, 1000), dtype)
        assert (buffer.device.type, buffer.dtype, tuple(buffer.shape)) == ("cpu", dtype, (3, 1000))
        assert not buffer.any()
        buffer.numpy()[...] = 7
        target = torch.empty(3, 1000, dtype=dtype, device=device.torch_device)
        target.copy_(buffer, non_blocking=True)
        device.synchronize()
        assert bool((target == 7).all())


def test_threads(conformance_platform: Platform) -> None:
    """A thread that activated the device computes on it."""
    device = conformance_platform.device()
    results: list[float] = []

    def work() -> None:
        device.activate()
        x = torch.arange(100.0, device=device.torch_device)
        event = device.event()
        event.record()
        event.synchronize()
        results.append(float(x.sum()))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [4950.0] * 3


def test_memory_info(conformance_platform: Platform) -> None:
    """Bytes: some are free, and no more than there are."""
    info = conformance_platform.device().memory_info()
    assert 64 * _MIB < info.free <= info.total


def test_kv_budget(conformance_platform: Platform) -> None:
    """It grows with the share, stays below it, and shrinks by what is allocated."""
    memory, device = conformance_platform.memory(), conformance_platform.device()
    memory.release()
    info = device.memory_info()
    small, large = memory.kv_budget(0.2), memory.kv_budget(0.8)
    assert 0 <= small <= large <= 0.8 * info.total
    assert small <= 0.2 * info.total
    assert memory.kv_budget(1e-9) < _MIB


def test_peak(conformance_platform: Platform) -> None:
    """What a block of work needed at its peak, not what it kept; a second measurement starts anew."""
    memory, device = conformance_platform.memory(), conformance_platform.device().torch_device
    memory.release()
    for size in (192, 64):
        with memory.peak() as extra:
            x = torch.ones(size * _MIB, dtype=torch.uint8, device=device)
            y = x + 1
            del x, y
        memory.release()
        assert 1.8 * size * _MIB < extra[0] < 2.5 * size * _MIB, f"{extra[0] / _MIB:.0f} MiB for 2 x {size}"


def test_works_after_out_of_memory(conformance_platform: Platform) -> None:
    """A failed allocation is an error, not the end."""
    device = conformance_platform.device()
    total = device.memory_info().total
    with pytest.raises(RuntimeError):  # torch.OutOfMemoryError is one
        torch.empty(1000 * total, dtype=torch.uint8, device=device.torch_device)
    x = torch.ones(100, device=device.torch_device)
    device.synchronize()
    assert float(x.sum()) == 100


def test_synchronize(conformance_platform: Platform) -> None:
    """It waits: a second call right after has nothing left to wait for."""
    device = conformance_platform.device()
    x = torch.randn(1024, 1024, device=device.torch_device)
    for _ in range(30):
        x = (x @ x).clamp(-1, 1)
    device.synchronize()
    start = time.perf_counter()
    device.synchronize()
    assert time.perf_counter() - start < 0.1
