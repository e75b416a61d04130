"""The CUDA platform with a faked device: what it says of each generation, and of machines on which it cannot run."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import engine_cuda
from engine_cuda import CudaPlatform
from engine_sdk import AttentionBatch, AttentionSpec, Capabilities, PlatformUnavailableError, UnsupportedCapability
from engine_sdk.layout import PagedCache


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a driver for CUDA 13.0, whose files are in a folder, and a torch that was built for it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(engine_cuda, "driver_version", lambda: (13, 0))
    monkeypatch.setattr(engine_cuda, "_GPUS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_declares(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    floats8 = {torch.float8_e4m3fn, torch.float8_e5m2} if capability >= (8, 9) else set()
    platform = CudaPlatform()
    monkeypatch.setattr(CudaPlatform, "graphs", lambda self: None)
    assert platform.capabilities().kv_dtypes - Capabilities().kv_dtypes == floats8


def why() -> str:
    found = CudaPlatform.probe()
    assert not found.available
    return found.reason


@pytest.mark.parametrize(
    ("driver", "built", "fits"),
    [((12, 8), "13.0", False), ((12, 2), "12.8", True), ((13, 1), "12.8", True), (None, "13.0", True)],
)
def test_driver(monkeypatch: pytest.MonkeyPatch, driver: tuple[int, int] | None, built: str, fits: bool) -> None:
    """A driver runs what was built for its own major version, or for an older one."""
    monkeypatch.setattr(engine_cuda, "driver_version", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", built)
    if fits:
        assert CudaPlatform.probe().available
    else:
        assert "too old: it runs CUDA up to 12.8" in why()
        assert "built for CUDA 13.0: update the driver, or install a build of torch for CUDA 12" in why()


def test_no_device(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "CUDA_VISIBLE_DEVICES is not set: check that nvidia-smi lists one" in why()
    (machine / "0000:01:00.0").mkdir()
    (machine / "0000:02:00.0").mkdir()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is '': the machine has 2: unset it, or name some of 0 to 1" in why()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(engine_cuda, "driver_version", lambda: None)
    assert "libcuda.so.1 is not here" in why()


def test_device_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver lists a GPU, and CUDA does not start on it."""

    def fails(index: int) -> None:
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(torch.cuda, "get_device_capability", fails)
    with pytest.raises(PlatformUnavailableError, match=r"GPU 0 cannot be used: CUDA driver .*\nremedy: .*nvidia-smi"):
        CudaPlatform().capabilities()


# Attention on Hopper.

LAYER = AttentionSpec(32, 8, 128, 128, 128**-0.5, torch.bfloat16, torch.bfloat16)


@pytest.fixture
def hopper() -> Iterator[ModuleType]:
    """The module of Hopper's attention, which needs Triton; which Triton there is has not been asked yet."""
    pytest.importorskip("triton")
    engine_cuda._hopper.cache_clear()
    yield importlib.import_module("engine_cuda.hopper")
    engine_cuda._hopper.cache_clear()


@pytest.mark.parametrize(
    ("capability", "release", "name"),
    [
        ((9, 0), "3.6.0", "HopperAttention"),
        ((9, 0), "3.7.1", "HopperAttention"),
        ((9, 0), "3.5.1", "TritonAttention"),
        ((9, 0), "3.8.0", "TritonAttention"),
        ((8, 0), "3.7.1", "TritonAttention"),
        ((10, 0), "3.7.1", "TritonAttention"),
    ],
)
def test_attention_of_each_generation(
    monkeypatch: pytest.MonkeyPatch, hopper: ModuleType, capability: tuple[int, int], release: str, name: str
) -> None:
    """Hopper has a kernel of its own, where Triton is a release whose Gluon it is written for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr("triton.__version__", release)
    platform = CudaPlatform()
    monkeypatch.setattr(CudaPlatform, "graphs", lambda self: None)
    assert type(platform.attention(LAYER)).__name__ == name
    assert type(platform.attention(replace(LAYER, window=100))).__name__ == "TritonAttention"
    with pytest.raises(UnsupportedCapability, match="kv_dtype"):
        platform.attention(replace(LAYER, kv_dtype=torch.int8))


@pytest.mark.parametrize(
    ("fields", "suits"),
    [
        ({}, True),
        ({"dtype": torch.float16, "kv_dtype": torch.float16}, True),
        ({"num_heads": 8}, True),
        ({"num_heads": 64, "num_kv_heads": 1}, True),
        ({"head_dim": 64, "v_head_dim": 64}, True),
        ({"num_heads": 24}, False),  # three heads of a group
        ({"num_heads": 128, "num_kv_heads": 1}, False),
        ({"head_dim": 96, "v_head_dim": 96}, False),
        ({"v_head_dim": 64}, False),
        ({"kv_dtype": torch.float8_e4m3fn}, False),
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, False),
        ({"window": 100}, False),
        ({"chunk": 100}, False),
        ({"softcap": 30.0}, False),
        ({"sinks": True}, False),
        ({"alibi": True}, False),
        ({"causal": False}, False),
        ({"scale": -1.0}, False),
    ],
)
def test_hopper_suits(hopper: ModuleType, fields: dict[str, Any], suits: bool) -> None:
    assert hopper.HopperAttention.suits(replace(LAYER, **fields)) == suits


def h200(hopper: ModuleType) -> Any:
    return hopper.HopperAttention(LAYER, device=hopper.DeviceProperties(132, 227 << 10, 32, True))


def step(new: list[int], before: int, *, block_size: int = 64, **fields: Any) -> AttentionBatch:
    starts = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32)
    lengths = torch.tensor(new, dtype=torch.int32) + before
    table = torch.ones(len(new), -(-int(lengths.max()) // block_size), dtype=torch.int32)
    slots = torch.zeros(sum(new), dtype=torch.int64)
    limits = {"max_query_len": max(new), "max_seq_len": int(lengths.max()), **fields}
    return AttentionBatch(starts, lengths, table, slots, starts, lengths, new.count(1), block_size=block_size, **limits)


@pytest.mark.parametrize(
    ("batch", "kernels", "items"),
    [
        (step([1] * 32, 1000), ["attend"], 0),
        (step([2048] * 4, 0), ["attend_prompts"], 4 * 64 * 8),
        (step([1, 1, 3, 700], 3000), ["attend", "attend_prompts"], 22 * 8),
        (step([1, 64], 8000), ["attend", "attend"], 0),  # few tiles of many keys
        (step([64], 1000), ["attend_prompts"], 2 * 8),  # few tiles of few keys
        (step([16] * 200, 100), ["attend"], 0),  # mostly empty tiles
        (step([2048] * 4, 0, block_size=16), ["attend"], 0),
        # Of a captured step: as many tiles as any replay has, of 33 requests at most.
        (step([1] * 255 + [1793], 0, captured=True, max_query_len=2048), ["attend", "attend_prompts"], (64 + 256) * 8),
        (step([4] * 64, 0, captured=True, max_query_len=4), ["attend"], 0),
    ],
)
def test_hopper_plans(hopper: ModuleType, batch: AttentionBatch, kernels: list[str], items: int) -> None:
    """Which requests go to which kernel."""
    plan = h200(hopper).plan(batch)
    assert [kernel for kernel, _ in launched(hopper, plan, batch)] == kernels
    if items:
        launch = plan.launches[-1]
        assert (launch.grid, launch.inputs[5]) == ((min(items, 132),), items)


def launched(hopper: ModuleType, plan: Any, batch: AttentionBatch, **odd: Any) -> list[tuple[str, tuple[Any, ...]]]:
    """The kernels that a step launches, and their arguments. `odd` elements lie before the query, or between blocks."""
    from triton.runtime.jit import JITFunction

    calls = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        calls.append((self.__name__, args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        size = batch.block_size * 8 * 128
        blocks = torch.zeros(3, 2 * size + odd.get("blocks", 0), dtype=torch.bfloat16)
        cache = PagedCache(*(x.unflatten(1, (-1, 8, 128)) for x in (blocks[:, :size], blocks[:, size : 2 * size])))
        if odd.get("head_major"):
            cache = PagedCache(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (cache.keys, cache.values)))
        first = odd.get("query", 0)
        q = torch.zeros(first + batch.num_tokens * 4096, dtype=torch.bfloat16)[first:].view(-1, 32, 128)
        h200(hopper).forward(q, None, None, cache, plan, torch.zeros_like(q))
    return calls


def test_hopper_describes_boxes(hopper: ModuleType) -> None:
    """What the copy engine is told, and Triton's kernel for what it cannot be told."""
    batch = step([512], 0)
    plan = h200(hopper).plan(batch)
    ((kernel, (q, keys, values, *_)),) = launched(hopper, plan, batch, blocks=64)
    assert kernel == "attend_prompts"
    assert (q.shape, q.block_shape) == ([512, 32, 128], [16, 4, 64])
    pitch = 2 * 64 * 1024 + 64
    for x in (keys, values):
        assert (x.shape, x.strides, x.block_shape) == ([3, 64, 1024], [pitch, 1024, 1], [1, 64, 64])
    assert values.base.data_ptr() - keys.base.data_ptr() == 64 * 1024 * 2
    for odd in ({"blocks": 4}, {"query": 4}, {"head_major": True}):
        ((kernel, _),) = launched(hopper, plan, batch, **odd)
        assert kernel == "attend", odd
