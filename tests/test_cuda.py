"""The CUDA platform with a faked device: what it says of each generation, and of machines on which it cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import engine_cuda
from engine_cuda import CudaPlatform
from engine_sdk import Capabilities, PlatformUnavailableError


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
