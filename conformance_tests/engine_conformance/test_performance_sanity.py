"""L8: what makes a right backend slow. Informative: nothing here fails on a time, and what is suspicious is said."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from engine_conformance.arena import Arena, outputs, prepare
from engine_conformance.cases import Case, Row, Scale, block, layer
from engine_conformance.watch import Watch
from engine_sdk import AttentionBackend, Capabilities, Platform

Record = Callable[[str, object], None]


def decode(platform: Platform, declared: Capabilities, rows: int, length: int) -> tuple[AttentionBackend, Arena]:
    """A step of decodes."""
    spec = layer(declared)
    backend = platform.attention(spec)
    case = Case(spec, block(declared), tuple(Row(length - 1 + i % 3, 1) for i in range(rows)))
    return backend, prepare(backend, case, declared, platform.device().torch_device)


def step(backend: AttentionBackend, arena: Arena) -> None:
    """Plan and call."""
    out, _ = outputs(arena)
    q, k, v = arena.tokens
    backend.forward(q, k, v, arena.cache, backend.plan(arena.batch), out)


def test_decodes_do_not_wait(
    conformance_platform: Platform, capabilities: Capabilities, scale: Scale, record_property: Record
) -> None:
    """While the device works, `plan` and `forward` of a step return; they ask it for nothing."""
    device = conformance_platform.device()
    backend, arena = decode(conformance_platform, capabilities, 16, scale.tokens(120))
    step(backend, arena)
    with Watch(device.torch_device) as watch:
        step(backend, arena)
    if watch.moved or watch.waited:
        record_property("inconclusive", f"a decode step waits for the device in {[*watch.moved, *watch.waited]}")
        return
    if not capabilities.asynchronous:
        return
    x = torch.ones(2048, 2048, device=device.torch_device) / 2048
    device.synchronize()
    begin = time.perf_counter()
    for _ in range(40):
        x = x @ x
    launched = time.perf_counter()
    step(backend, arena)
    returned = time.perf_counter()
    device.synchronize()
    busy = time.perf_counter() - begin
    record_property("seconds: a decode step beside a busy device", returned - launched)
    if returned - launched > 0.5 * busy > 0.05:
        record_property(
            "inconclusive",
            f"plan and forward of a decode step took {returned - launched:.3f} s of the {busy:.3f} s that the device "
            "was busy with something else: they seem to wait for it",
        )


def test_host_time_of_a_decode(
    conformance_platform: Platform, capabilities: Capabilities, scale: Scale, record_property: Record
) -> None:
    """How long the host needs to plan and launch the attention of a step, the device's work included on a host."""
    device = conformance_platform.device()
    backend, arena = decode(conformance_platform, capabilities, 32, scale.tokens(100))
    times = []
    for _ in range(12):
        device.synchronize()
        begin = time.perf_counter()
        step(backend, arena)
        times.append(time.perf_counter() - begin)
    record_property("seconds: plan and forward of 32 decodes, host", sorted(times[2:])[5])


def test_shapes_do_not_recompile(
    conformance_platform: Platform, capabilities: Capabilities, record_property: Record
) -> None:
    """Steps of many shapes compile a few graphs, and not one each."""
    from torch._dynamo.utils import counters

    spec = layer(capabilities)
    backend = conformance_platform.attention(spec)
    device = conformance_platform.device().torch_device
    before = counters["stats"]["unique_graphs"]
    slowest, total = 0.0, 0.0
    steps = 24
    for index in range(steps):
        rows = (*(Row(5 * index + i, 1) for i in range(1 + index % 7)), Row(index, 2 + 3 * index))
        arena = prepare(backend, Case(spec, block(capabilities), rows, seed=index), capabilities, device)
        begin = time.perf_counter()
        step(backend, arena)
        conformance_platform.device().synchronize()
        took = time.perf_counter() - begin
        if index >= steps // 2:
            slowest, total = max(slowest, took), total + took
    compiled = counters["stats"]["unique_graphs"] - before
    record_property("graphs compiled for 24 shapes", compiled)
    if compiled > steps // 2:
        record_property("inconclusive", f"{compiled} graphs were compiled for {steps} steps of different shapes")
    elif slowest > 1.0 and slowest > 10 * total / steps:
        record_property("inconclusive", f"a later step of a new shape took {slowest:.1f} s: something is built for it")


def test_work_grows_with_the_length(
    conformance_platform: Platform, capabilities: Capabilities, scale: Scale, record_property: Record
) -> None:
    """A decode's time follows the sequences that there are, not the widest block table that could be."""
    if scale.max_tokens is not None:
        return
    device = conformance_platform.device()
    times = {}
    for width in (0, 4096):
        spec = layer(capabilities)
        backend = conformance_platform.attention(spec)
        case = Case(spec, block(capabilities), tuple(Row(60, 1) for _ in range(8)), width=width)
        arena = prepare(backend, case, capabilities, device.torch_device)
        found = []
        for _ in range(8):
            device.synchronize()
            begin = time.perf_counter()
            step(backend, arena)
            device.synchronize()
            found.append(time.perf_counter() - begin)
        times[width] = sorted(found)[3]
    record_property("seconds: 8 decodes of 61 tokens, tables of 4096 blocks", times[4096])
    if times[4096] > 0.002 and times[4096] > 8 * times[0]:
        record_property("inconclusive", f"a wide block table makes a decode {times[4096] / times[0]:.0f} times slower")
