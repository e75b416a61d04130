"""Builds the device's code, one C++ file with one call of the compiler, and loads it into torch."""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
import os
import subprocess
from pathlib import Path

import torch
from torch.utils.backend_registration import generate_methods_for_privateuse1_backend

from npu_sim import driver

_SOURCE = Path(__file__).with_name("npu_sim.cpp")
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-DAT_PER_OPERATOR_HEADERS")


@functools.cache
def load() -> None:
    """Bring the device into torch. The first call on a machine takes the time of a compilation.

    Raises `RuntimeError` without a compiler, or with what it said.
    """
    torch.ops.load_library(str(build()))
    torch.ops.npu_sim.configure(driver.device_count(), driver.total_memory(), driver.generation())
    generate_methods_for_privateuse1_backend()
    atexit.register(torch.ops.npu_sim.settle)  # workers may need Python, which is about to end


def build() -> Path:
    """The compiled library, from the user's cache where source, flags and torch are those of the last build."""
    name = hashlib.sha256(_SOURCE.read_bytes() + repr((_FLAGS, torch.__version__, torch.__file__)).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npu_sim"
    library = cache / f"{name[:16]}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of many processes one compiles
        if not library.exists():
            _compile(library)
    return library


def _compile(library: Path) -> None:
    if (compiler := driver.compiler()) is None:
        raise RuntimeError(
            "npu_sim compiles its device on first use, and there is no C++ compiler: install g++ or set CXX"
        )
    torch_folder = Path(torch.__file__).parent
    unfinished = library.with_suffix(".part")
    command = [
        *(compiler, *_FLAGS, str(_SOURCE), "-o", str(unfinished), f"-I{torch_folder}/include"),
        *(f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"npu_sim cannot compile its device\ncommand: {' '.join(command)}\n{done.stderr[-4000:]}")
    unfinished.rename(library)
