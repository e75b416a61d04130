"""Kernels in C++: built once on the machine that runs them, with its own compiler, and loaded through `ctypes`.

The sources in ``kernels/`` have a C interface and need no header but the compiler's. What was built is kept in the
user's cache, under a name that follows from sources, compiler, flags and processor, so nothing stale is ever loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "kernels"
REMEDY = "install g++ or clang++ with OpenMP, or name a C++17 compiler in CXX"

_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-w")
"""Not ``-ffast-math``: linked into a shared library it would flush subnormal numbers in the whole process."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, built if they were not yet; None, with one warning that names the remedy, where they cannot be."""
    try:
        return ctypes.CDLL(str(build()))
    except (OSError, BuildError) as error:
        log.warning("the model runs in plain torch, and slower, as kernels cannot be built: %s", error)
        return None


class BuildError(Exception):
    """The kernels cannot be built here; the message says why, and what helps."""


def build(extra: Sequence[str] = (), folder: Path | None = None) -> Path:
    """The shared library, compiled unless it is there already; raises `BuildError`.

    Any number of processes may build at once: each writes a file of its own and renames it.

    Args:
        extra: flags after ours.
        folder: where it is kept; the user's cache if None.
    """
    compiler = _compiler()
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    command = [*compiler, *_FLAGS, native, *extra]
    sources = sorted(SOURCES.iterdir())
    key = hashlib.sha256()
    for part in (*command, _output([*compiler, "--version"]), _processor(), *(s.read_text() for s in sources)):
        key.update(part.encode() + b"\0")
    folder = folder or _cache()
    target = folder / f"kernels-{key.hexdigest()[:24]}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
    except OSError as error:
        raise BuildError(f"{folder} cannot be written: {error}; name another folder in XDG_CACHE_HOME") from error
    try:
        units = [str(source) for source in sources if source.suffix == ".cpp"]
        _output([*command, *units, "-o", made])
        os.replace(made, target)
    finally:
        Path(made).unlink(missing_ok=True)
    return target


def _compiler() -> list[str]:
    """The command of a C++ compiler."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named
    for name in ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError(f"there is no C++ compiler; {REMEDY}")


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    except subprocess.CalledProcessError as error:
        reason = "\n".join(error.stderr.strip().splitlines()[:5])
        raise BuildError(f"{shlex.join(command[:1])} failed: {reason}; {REMEDY}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command[:1])} cannot be run: {error}; {REMEDY}") from error


def _processor() -> str:
    """What the compiler's ``native`` follows from."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model", "CPU part"))}))


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "engine" / "cpu"
