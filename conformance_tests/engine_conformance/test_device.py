"""L0: the device, its memory, and what a platform must declare."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import pytest
import torch

from engine.config import EngineArgs
from engine_sdk import ATTENTION_FEATURES, Capabilities, Event, Platform

Record = Callable[[str, object], None]

_MIB = 1 << 20


def test_declares_what_it_must(capabilities: Capabilities) -> None:
    """fp32 and a 16-bit dtype, in weights and cache; a head size and a block size; data that can be reported."""
    for dtypes in (capabilities.dtypes, capabilities.kv_dtypes):
        assert torch.float32 in dtypes
        assert dtypes & {torch.bfloat16, torch.float16}
    assert any(size in capabilities.head_dims for size in range(1, 1025))
    assert any(size in capabilities.block_sizes for size in range(1, 1025))
    json.dumps(capabilities.to_dict())


def test_declares_the_same(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """What is declared is the same each time, and after the device was used; values are of the declared types."""
    for _ in range(3):
        assert conformance_platform.capabilities() == capabilities
    assert type(conformance_platform)(conformance_platform.device_index).capabilities() == capabilities
    assert capabilities.attention <= ATTENTION_FEATURES
    assert all(isinstance(dtype, torch.dtype) for dtype in capabilities.dtypes | capabilities.kv_dtypes)
    assert capabilities.graphs in ("none", "uniform", "full")
    assert capabilities.numerics in ("A", "B")
    for name in ("nan_safe", "deterministic", "batch_invariant", "asynchronous"):
        assert isinstance(getattr(capabilities, name), bool), name


def test_configure(conformance_platform: Platform) -> None:
    """Defaults name options that there are, with values that these may have; asking changes nothing."""
    options = asdict(EngineArgs())
    first, second = (conformance_platform.configure(dict(options)) for _ in range(2))
    varies = {"kv_cache_memory_bytes"}  # with the memory that is free just then
    assert first.refusals == second.refusals
    assert {k: v for k, v in first.defaults.items() if k not in varies} == {
        k: v for k, v in second.defaults.items() if k not in varies
    }
    assert not first.refusals, "options that were left open are refused"
    known = {field.name for field in fields(EngineArgs)}
    assert set(first.defaults) <= known, "a default for an option that there is not"
    EngineArgs.of(**first.defaults)


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
    """Once an event has been waited for, the work before it is done; a new one has nothing to wait for."""
    device = conformance_platform.device()
    x = torch.ones(512, 512, device=device.torch_device)
    event = device.event()
    for _ in range(3):  # an event may be recorded again
        for _ in range(10):
            x = x @ x / 512
        event.record()
        event.synchronize()
        assert event.query()
    fresh = device.event()
    fresh.synchronize()  # never recorded: nothing to wait for
    assert device.event() is not fresh
    assert bool((x == 1).all())


@dataclass
class Race:
    """What a host saw of a copy to it: before it waited, and after."""

    early: bool
    late: bool


def race(platform: Platform, wait: Callable[[Event], None], side: int, rounds: int) -> Race:
    """Let the device multiply matrices, copy the result to the host, and look before and after `wait`."""
    device = platform.device()
    x = torch.ones(side, side, device=device.torch_device) / side
    target = device.host_buffer((side,), torch.float32)
    done = device.event()
    device.synchronize()
    for _ in range(rounds):
        x = x @ x
    target.copy_(x.sum(1) + 6, non_blocking=True)
    done.record()
    early = bool((target == 7).all())
    wait(done)
    return Race(early, bool((target == 7).all()))


def until_done(event: Event) -> None:
    """Ask until the answer is yes."""
    end = time.monotonic() + 60
    while not event.query():
        assert time.monotonic() < end, "the event is never done"


@pytest.mark.parametrize("how", ["event", "query", "device"])
def test_waiting_waits(
    conformance_platform: Platform, capabilities: Capabilities, how: str, record_property: Record
) -> None:
    """What a host reads after a wait is there; without one it is not yet, or there was nothing to wait for."""
    device = conformance_platform.device()
    waits: dict[str, Callable[[Event], None]] = {
        "event": lambda event: event.synchronize(),
        "query": until_done,
        "device": lambda _: device.synchronize(),
    }
    for side, rounds in ((512, 10), (512, 40), (512, 160), (1024, 160), (2048, 160), (4096, 160)):
        seen = race(conformance_platform, waits[how], side, rounds)
        assert seen.late, "the copy was not there after the wait"
        if not (capabilities.asynchronous and seen.early):
            return
    record_property("inconclusive", "the host never came before the device: the wait was not put to a test")


def test_an_event_is_of_its_moment(conformance_platform: Platform) -> None:
    """Later work does not move an event: it is done while that still runs."""
    device = conformance_platform.device()
    event = device.event()
    torch.ones(10, device=device.torch_device).add_(1)
    event.record()
    event.synchronize()
    x = torch.ones(1024, 1024, device=device.torch_device) / 1024
    for _ in range(20):
        x = x @ x
    assert event.query(), "an event that was done is not any more"
    device.synchronize()


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


def test_side_stream_after_long_work(conformance_platform: Platform) -> None:
    """The same with work that takes a while on either stream, and an error inside, after which all goes on."""
    device = conformance_platform.device()
    x = torch.zeros(1024, 1024, device=device.torch_device)
    slow = torch.eye(1024, device=device.torch_device)
    want = 0.0
    for _ in range(4):
        y = slow
        for _ in range(10):
            y = y @ slow
        x.add_(y.diagonal().mean())
        with device.side_stream():
            y = slow
            for _ in range(10):
                y = y @ slow
            x.mul_(2).add_(y.diagonal().mean())
        x.sub_(1)
        want = (want + 1) * 2 + 1 - 1
    assert bool((x == want).all())
    on_host = device.torch_device.type == "cpu"
    before = None if on_host else torch.accelerator.current_stream(device.torch_device)
    with pytest.raises(ZeroDivisionError), device.side_stream():
        raise ZeroDivisionError
    assert on_host or torch.accelerator.current_stream(device.torch_device) == before, "the side stream stays current"
    x.add_(1)
    assert bool((x == want + 1).all())


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
    one, two = (device.host_buffer((100,), torch.int64) for _ in range(2))
    one.fill_(1)
    assert not two.any(), "two buffers are one"
    again = device.host_buffer((100,), torch.int64)
    assert not again.any(), "a new buffer holds what another held"
    assert device.host_buffer((0, 4), torch.float32).shape == (0, 4)


def test_host_buffers_one_after_another(conformance_platform: Platform) -> None:
    """A buffer that goes while a copy from it is under way is not handed out again before that is done."""
    device = conformance_platform.device()
    targets = []
    for i in range(30):
        buffer = device.host_buffer((200_000,), torch.int32)
        assert not buffer.any()
        buffer.fill_(i)
        target = torch.empty(200_000, dtype=torch.int32, device=device.torch_device)
        target.copy_(buffer, non_blocking=True)
        targets.append(target)
        del buffer
    device.synchronize()
    for i, target in enumerate(targets):
        assert bool((target == i).all()), f"copy {i}"


def test_threads(conformance_platform: Platform) -> None:
    """A thread that activated the device computes on it, while others do; events are of the thread's own work."""
    device = conformance_platform.device()
    results: list[float] = []

    def work() -> None:
        device.activate()
        for _ in range(5):
            x = torch.arange(100.0, device=device.torch_device)
            event = device.event()
            event.record()
            event.synchronize()
            with device.side_stream():
                y = x + 1
            results.append(float(y.sum()))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [5050.0] * 15


@pytest.mark.conformance(must=False, capability="devices")
def test_current_device_is_of_a_thread(conformance_platform: Platform, record_property: Record) -> None:
    """Two devices, each current in a thread of its own, in a process of its own: neither moves the other's."""
    probe = conformance_platform.probe()
    if not probe.accelerator or len(probe.devices) < 2:
        record_property("inconclusive", "there is one device, or the host")
        return
    code = f"""
import threading, torch
from engine.plugins import load_platform
first, second = (load_platform({conformance_platform.name!r}, i).device() for i in (0, 1))
assert (first.torch_device.index, second.torch_device.index) == (0, 1)
index = torch.accelerator.current_device_index
second.activate()
assert index() == 1
seen, turn = [], threading.Event()
def other():
    first.activate()
    seen.append(index())
    turn.wait()
    seen.append(index())
    seen.append(torch.ones(3, device=torch.device(first.torch_device.type)).device.index)
thread = threading.Thread(target=other)
thread.start()
while not seen:
    pass
assert index() == 1, "another thread's choice became this one's"
second.activate()
turn.set()
thread.join()
assert seen == [0, 0, 0], seen
x = torch.ones(1 << 20, device=second.torch_device)
event = second.event()
first.activate()
y = x * 2
event.record()
event.synchronize()
second.synchronize()
assert y.device.index == 1 and bool((y == 2).all())
with second.side_stream():
    y.add_(1)
assert bool((y == 3).all())
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_memory_info(conformance_platform: Platform) -> None:
    """Bytes: some are free, and no more than there are."""
    info = conformance_platform.device().memory_info()
    assert 64 * _MIB < info.free <= info.total


def changes(figure: Callable[[], int], size: int, device: torch.device) -> bool:
    """Whether a figure falls by 0.4 of `size` while that many bytes are held, and rises again once they are not.

    Others may take memory of the same device at any moment, and some systems tell late: so it is tried for a while.
    """

    def soon(condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + 2
        while not (met := condition()) and time.monotonic() < end:
            time.sleep(0.02)
        return met

    for _ in range(6):
        before = figure()
        held = torch.ones(size, dtype=torch.uint8, device=device)
        held.add_(1)
        fell = soon(lambda before=before: before - figure() > 0.4 * size)  # type: ignore[misc]
        during = figure()
        del held
        if fell and soon(lambda during=during: figure() - during > 0.4 * size):  # type: ignore[misc]
            return True
    return False


def test_free_memory_shrinks(conformance_platform: Platform, record_property: Record) -> None:
    """By what is allocated, and it comes back; the total stays. A host's is shared with all that runs there."""
    memory, device = conformance_platform.memory(), conformance_platform.device()
    seen = [device.memory_info()]

    def free() -> int:
        device.synchronize()
        memory.release()
        seen.append(device.memory_info())
        return seen[-1].free

    followed = changes(free, min(512 * _MIB, free() // 4), device.torch_device)
    assert {info.total for info in seen} == {seen[0].total}, "the total changed"
    if not followed and not conformance_platform.probe().accelerator and len(set(seen)) > 1:
        record_property("inconclusive", "what others do on this host hides what one process allocates")
        return
    assert followed, "free memory does not follow what is allocated"


def test_kv_budget_shrinks(conformance_platform: Platform) -> None:
    """By what the process holds: weights and cache together stay within the share."""
    memory, device = conformance_platform.memory(), conformance_platform.device()
    memory.release()
    total = device.memory_info().total
    # A small share, of which this process has a large part: else what others hold decides.
    share = next((s for s in (0.05, 0.2, 0.5) if memory.kv_budget(s) > 0.3 * s * total), 0.9)
    size = int(0.6 * memory.kv_budget(share))
    assert changes(lambda: memory.kv_budget(share), size, device.torch_device), (
        "the budget does not follow what is held"
    )


def test_kv_budget(conformance_platform: Platform) -> None:
    """It grows with the share, stays below it, and shrinks by what is allocated."""
    memory, device = conformance_platform.memory(), conformance_platform.device()
    memory.release()
    info = device.memory_info()
    small, large = memory.kv_budget(0.2), memory.kv_budget(0.8)
    assert 0 <= small <= large <= 0.8 * info.total
    assert small <= 0.2 * info.total
    assert memory.kv_budget(1e-9) < _MIB


def test_cache_memory(conformance_platform: Platform) -> None:
    """It is zero, whatever was there before, and its own; what is too much is an error, and work goes on."""
    memory, device = conformance_platform.memory(), conformance_platform.device()
    for size in (1, 4099, 8 * _MIB):
        first, second = memory.allocate(size), memory.allocate(size)
        for x in (first, second):
            assert (x.dtype, x.shape, x.device.type) == (torch.uint8, (size,), device.torch_device.type)
            assert x.is_contiguous()
            assert x.data_ptr() % 64 == 0, "vector instructions and copies want whole cache lines"
            assert not x.any(), "not zeroed"
        first.fill_(255)
        assert not second.any(), "two caches share memory"
        del x, first, second
    with pytest.raises((torch.OutOfMemoryError, RuntimeError, OSError)):
        memory.allocate(1 << 50)
    assert not memory.allocate(_MIB).any()


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
        assert len(extra) == 1
        assert 1.8 * size * _MIB < extra[0] < 2.5 * size * _MIB, f"{extra[0] / _MIB:.0f} MiB for 2 x {size}"


def test_works_after_out_of_memory(conformance_platform: Platform) -> None:
    """A failed allocation is an error, not the end."""
    device = conformance_platform.device()
    total = device.memory_info().total
    with pytest.raises(RuntimeError):  # torch.OutOfMemoryError is one
        torch.empty(1000 * total, dtype=torch.uint8, device=device.torch_device)
    for _ in range(2):
        x = torch.ones(100, device=device.torch_device)
        device.synchronize()
        assert float(x.sum()) == 100
        with pytest.raises(RuntimeError):  # one after another, too
            torch.empty(1000 * total, dtype=torch.uint8, device=device.torch_device)
    event = device.event()
    event.record()
    event.synchronize()
    assert device.memory_info().total == total


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
