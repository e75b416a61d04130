"""The ROCm platform with a faked device: what it says of each architecture, and of machines on which it cannot run.

It has not run on hardware. What torch, the kernel driver and Triton's driver answer is taken from their documentation.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import engine_rocm
from engine_rocm import HipGraphs, RocmPlatform
from engine_sdk import AttentionSpec, Capabilities, PlatformUnavailableError, UnsupportedCapability

ROOT = Path(__file__).parents[1]
KIB = 1 << 10
FNUZ = {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
OCP = {torch.float8_e4m3fn, torch.float8_e5m2}

GPUS: dict[str, Any] = {
    # name: (gfx_target_version, compute units, LDS, wavefront, 8-bit floats)
    "gfx90a": (90010, 104, 64 * KIB, 64, set()),
    "gfx942": (90402, 304, 64 * KIB, 64, FNUZ),
    "gfx950": (90500, 256, 160 * KIB, 64, OCP),
    "gfx1100": (110000, 48, 64 * KIB, 32, set()),
    "gfx1201": (120001, 32, 64 * KIB, 32, OCP),
}


class Machine:
    """A machine with AMD GPUs, or what is wrong with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._patch, self._folder = monkeypatch, folder
        for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch.version, "hip", "7.2.0")
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(engine_rocm, "_KFD", folder / "kfd")
        (folder / "kfd").touch()
        self.has()

    def has(self, *names: str, visible: int | None = None, built_for: tuple[str, ...] = tuple(GPUS)) -> None:
        """GPUs of these architectures, of which torch, built for some, sees `visible`."""
        topology = self._folder / f"nodes of {'-'.join(names)}"
        for node, version in enumerate([0, *(GPUS[name][0] for name in names)]):  # the processor first
            (topology / str(node)).mkdir(parents=True)
            (topology / str(node) / "properties").write_text(f"simd_count 4\ngfx_target_version {version}\n")
        self._patch.setattr(engine_rocm.architectures, "__defaults__", (topology,))
        self._patch.setattr(torch.cuda, "device_count", lambda: len(names) if visible is None else visible)
        self._patch.setattr(torch.cuda, "get_arch_list", lambda: [f"{name}:xnack-" for name in built_for])
        said = [SimpleNamespace(gcnArchName=f"{name}:sramecc+:xnack-") for name in names]
        self._patch.setattr(torch.cuda, "get_device_properties", said.__getitem__)

    def triton_sees(self, name: str) -> None:
        """What Triton's driver answers about a GPU."""
        from triton.runtime import driver

        from engine_sdk.triton import tuning

        _, cores, shared, wavefront, _ = GPUS[name]
        utils = SimpleNamespace(
            get_device_properties=lambda index: {"multiprocessor_count": cores, "max_shared_mem": shared}
        )
        active = SimpleNamespace(
            utils=utils, get_current_target=lambda: SimpleNamespace(warp_size=wavefront, arch=name)
        )
        self._patch.setattr(type(driver), "active", active)
        tuning.device_properties.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def layer(kv_dtype: torch.dtype = torch.bfloat16) -> AttentionSpec:
    return AttentionSpec(32, 8, 128, 128, 128**-0.5, torch.bfloat16, kv_dtype)


@pytest.mark.parametrize("name", GPUS)
def test_declares(machine: Machine, name: str) -> None:
    """Each architecture's own 8-bit floats, and everything else alike."""
    machine.has(name)
    probe, declared = RocmPlatform.probe(), RocmPlatform().capabilities()
    assert (probe.available, [d.name for d in probe.devices]) == (True, [name])
    assert declared.kv_dtypes - Capabilities().kv_dtypes == GPUS[name][4]
    assert (declared.graphs, declared.nan_safe, declared.asynchronous, declared.numerics) == ("full", True, True, "A")
    assert 128 in declared.head_dims
    assert "all_reduce" in declared.collectives
    for kv_dtype in FNUZ | OCP:
        if kv_dtype in GPUS[name][4]:
            assert RocmPlatform().attention(layer(kv_dtype)).spec.kv_dtype is kv_dtype
            continue
        with pytest.raises(UnsupportedCapability, match="kv_dtypes"):
            RocmPlatform().attention(layer(kv_dtype))


@pytest.mark.parametrize("name", GPUS)
def test_tiles(machine: Machine, name: str) -> None:
    """Cut by what Triton's driver says of the device; a device that says the same, of whatever name, is cut alike."""
    from engine_sdk.triton.tuning import DeviceProperties, attention_tuning, device_properties

    machine.triton_sees(name)
    _, cores, shared, wavefront, _ = GPUS[name]
    found = device_properties(torch.device("cuda", 0))
    assert found == DeviceProperties(cores, shared, wavefront)
    for head_dim, v_head_dim in ((64, 64), (128, 128), (256, 256), (192, 128), (576, 512)):
        tuned = attention_tuning(found, 4, head_dim, v_head_dim, 2, 2)
        for tile in (tuned.decode, tuned.prefill):
            assert tile.depth * tile.block_n * (head_dim + v_head_dim) * 2 <= shared, (head_dim, tile)
    small = attention_tuning(DeviceProperties(cores, 64 * KIB, wavefront), 4, 128, 128, 2, 2)
    tuned = attention_tuning(found, 4, 128, 128, 2, 2)
    assert (tuned == small) == (shared == 64 * KIB), "more memory is used, and nothing else makes a difference"


def test_several(machine: Machine) -> None:
    """Each device has an architecture of its own; where some are hidden, nobody knows which."""
    machine.has("gfx942", "gfx950")
    assert [d.name for d in RocmPlatform.probe().devices] == ["gfx942", "gfx950"]
    assert RocmPlatform(0).capabilities().kv_dtypes > FNUZ
    assert RocmPlatform(1).capabilities().kv_dtypes > OCP
    machine.has("gfx942", "gfx950", "gfx950", visible=1)
    assert [d.name for d in RocmPlatform.probe().devices] == ["AMD GPU 0"]


def why(probe: Any) -> str:
    assert not probe.available
    return str(probe.reason)


def test_no_device(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "HIP_VISIBLE_DEVICES is not set: check that rocminfo lists one" in why(RocmPlatform.probe())
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "9")
    assert "ROCR_VISIBLE_DEVICES is '9': name GPUs there" in why(RocmPlatform.probe())
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "kfd")
    assert "may not open /dev/kfd: add it to the groups render and video" in why(RocmPlatform.probe())
    (tmp_path / "kfd").unlink()
    assert "load the amdgpu driver" in why(RocmPlatform.probe())


def test_architecture_that_torch_lacks(machine: Machine) -> None:
    machine.has("gfx1201", built_for=("gfx90a", "gfx942"))
    assert "has no kernels for gfx1201, only for gfx90a, gfx942: install a build" in why(RocmPlatform.probe())
    machine.has("gfx1201", "gfx942", built_for=("gfx90a", "gfx942"))
    assert RocmPlatform.probe().available


def test_device_that_fails(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(index: int) -> None:
        raise RuntimeError("hipErrorNoDevice")

    machine.has("gfx942")
    monkeypatch.setattr(torch.cuda, "get_device_properties", fails)
    with pytest.raises(PlatformUnavailableError, match=r"GPU 0 cannot be used: hipErrorNoDevice\nremedy: .*ROCm 7.2"):
        RocmPlatform().capabilities()


def test_captures_of_one_thread(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other threads do, such as those of torch.distributed, does not end a capture."""
    begun: list[dict[str, Any]] = []
    fake = SimpleNamespace(capture_begin=lambda pool, **how: begun.append({"pool": pool, **how}))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: fake)
    graphs = RocmPlatform().graphs()
    assert isinstance(graphs, HipGraphs)
    assert graphs._begin(None) is fake
    assert begun == [{"pool": None, "capture_error_mode": "thread_local"}]


@pytest.mark.skipif(torch.version.hip is not None, reason="this is a build for ROCm")
def test_conformance_without_a_device() -> None:
    """The suite ends at once, with the reason: it passes nothing that it has not run."""
    command = [sys.executable, "-m", "pytest", "conformance_tests", "--platform=rocm", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, said
    assert "'rocm' (engine" in said
    assert "cannot run here" in said
    assert "without ROCm" in said or "for CUDA, whose platform is cuda" in said
    assert "passed" not in said
