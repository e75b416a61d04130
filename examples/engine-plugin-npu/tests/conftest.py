"""The device under test, and processes of their own for what must not happen in this one."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import npu_sim
import pytest
import torch

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def device() -> None:
    npu_sim.load()


@pytest.fixture
def no_waits() -> Iterator[None]:
    """An operator that makes the host wait is an error."""
    torch.npu.synchronize()
    torch.npu.set_sync_debug_mode("error")
    yield
    torch.npu.set_sync_debug_mode("default")


@pytest.fixture
def run() -> Run:
    """Runs Python code in a process of its own, where torch and the simulator are imported."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        import os

        source = f"import torch, npu_sim\n{code}"
        env = {**os.environ, **environment}
        return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=env, check=False)

    return run
