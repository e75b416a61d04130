"""The kernels on an instruction set that this machine may not have, against the references that serve everywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = ("aarch64-linux-gnu-g++", "qemu-aarch64")


@pytest.mark.skipif(
    not all(map(shutil.which, PROGRAMS)),
    reason="needs a compiler for aarch64 and an emulator: apt install g++-aarch64-linux-gnu qemu-user",
)
@pytest.mark.parametrize("processor", ["cortex-a72", "neoverse-n2"])  # plain NEON; products of bf16, and SVE
def test_aarch64_agrees_with_the_references(processor: str, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "emulated.py"), str(tmp_path), f"-mcpu={processor}", "-O1"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.stdout.strip() == "all is well", done.stderr[-4000:]
