"""`engine doctor`: describe this installation, ready to be pasted into a bug report. It prints no secrets."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import importlib_metadata

from engine.discovery import HOOKS, Plugin, describe, discover
from engine.errors import EngineError
from engine.extensions.cli.platforms import selection, survey
from engine.extensions.cli.text import fields, size
from engine.plugins import Hooks, load_platform

_PACKAGES = ("engine", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "msgspec", "pluggy")

_CPU_FLAGS = re.compile(
    r"fma|f16c|avx2?|avx_vnni|avx512(f|bw|vl|_vnni|_bf16|_fp16)|amx_\w+|asimd(dp|hp)?|bf16|i8mm|sve2?"
)
_VARIABLES = re.compile(
    r"(ENGINE|TORCH|PYTORCH|TRITON|HF|TRANSFORMERS|TOKENIZERS|OMP|KMP|GOMP|MKL|OPENBLAS|NCCL|GLOO|MASTER)_.*"
    r"|TORCHINDUCTOR_.*|.*_VISIBLE_DEVICES|WORLD_SIZE|RANK|LOCAL_RANK|PYTHONPATH|LD_LIBRARY_PATH|LD_PRELOAD|TMPDIR"
)
_CGROUPS = Path("/sys/fs/cgroup")
_SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSW|CREDENTIAL|AUTH")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    about = "also try the operators that the engine needs on this platform's device; exit status 1 if some fail"
    parser.add_argument("--platform", metavar="NAME", help=about)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    report = {section.__name__.strip("_"): _attempt(section) for section in _SECTIONS}
    if args.platform:
        report["operators"] = _attempt(functools.partial(_operators, args.platform))
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n\n".join(f"{title}\n{fields(values)}" for title, values in report.items()))
    return int(bool(report.get("operators", {}).keys() - {"tried", "device"}))


def _attempt(section: Callable[[], dict[str, object]]) -> dict[str, Any]:
    # A sick installation is what the report is for, so what fails is a line of it.
    try:
        return section()
    except Exception as error:
        return {"error": describe(error)}


def _system() -> dict[str, object]:
    cpuinfo = _read("/proc/cpuinfo")
    found = dict(re.findall(r"^(model name|flags|Features)\s*: (.*)$", cpuinfo, re.MULTILINE))
    flags = set((found.get("flags") or found.get("Features") or "").split())
    meminfo = {k: int(v) * 1024 for k, v in re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)}
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.platform(),
        "CPU": found.get("model name") or platform.processor() or platform.machine(),
        "CPU flags": sorted(filter(_CPU_FLAGS.fullmatch, flags)),
        "CPUs": f"{usable} usable of {os.cpu_count()}",
        "CPU limit": _cpu_limit(),
        "memory": f"{size(meminfo.get('MemAvailable'))} available of {size(meminfo.get('MemTotal'))}",
        "memory limit": _memory_limit(),
        "shared memory": _free(Path("/dev/shm")),
    }


def _python() -> dict[str, object]:
    return {
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "path": _tidy(sys.executable),
    }


def _packages() -> dict[str, object]:
    versions: dict[str, object] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib_metadata.version(name)
        except importlib_metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _torch() -> dict[str, object]:
    import torch

    compiled_for = torch.accelerator.current_accelerator(check_available=False)
    return {
        "accelerator": str(compiled_for or "none in this build"),
        "devices": torch.accelerator.device_count(),
        "threads": f"{torch.get_num_threads()} in an operation, {torch.get_num_interop_threads()} between operations",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "build": [line.strip(" -") for line in torch.__config__.show().splitlines()[1:] if "Build set" not in line],
    }


def _environment() -> dict[str, object]:
    return {
        k: "(set)" if _SECRET.search(k) else _tidy(v) for k, v in sorted(os.environ.items()) if _VARIABLES.fullmatch(k)
    }


def _plugins() -> dict[str, object]:
    chosen, problem = selection()
    platforms = {
        f"platform {p['name']}": f"{p['distribution']} {p['version']}, {p['status']}\n{p['reason']}" for p in survey()
    }
    hooks = {f"hooks {p.name}": f"{p.distribution} {p.version}, {_hook_status(p)}" for p in discover(HOOKS)}
    return {"by default": chosen or problem.partition("\n")[0], **platforms, **hooks}


def _operators(name: str) -> dict[str, object]:
    from engine.extensions.cli.operators import NEEDED, unsupported

    platform = load_platform(name)
    failed = {
        f"{operator.name} {str(dtype).removeprefix('torch.')}": f"{operator.needed}\n{cause}"
        for operator, dtype, cause in unsupported(platform)
    }
    return {"device": str(platform.device().torch_device), "tried": f"{len(NEEDED)}, {len(failed)} failed", **failed}


def _caches() -> dict[str, object]:
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    return {
        "models": _free(Path(hub)),
        "compiled": _free(Path(inductor)),
        "kernels": _free(Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache")),
    }


def _hook_status(plugin: Plugin) -> str:
    try:
        Hooks([plugin])
    except EngineError as error:
        return f"broken\n{error}"
    return "ok"


_SECTIONS = (_system, _python, _packages, _torch, _environment, _plugins, _caches)


def _tidy(text: str) -> str:
    """Without the user's name and without a password in a URL."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text.replace(f"{Path.home()}/", "~/"))


def _free(path: Path) -> str:
    """The free space where `path` is, or would be made."""
    real = path.expanduser().absolute()
    there = next(p for p in (real, *real.parents) if p.exists())
    return f"{size(shutil.disk_usage(there).free)} free at {_tidy(str(real))}"


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cgroup(name: str) -> Iterator[str]:
    """What the process's control group (version 2) and the groups around it say; the tightest counts."""
    group = _CGROUPS / _own_cgroup()
    yield from (_read(g / name).strip() for g in (group, *group.parents) if g.is_relative_to(_CGROUPS))


def _own_cgroup() -> str:
    found = re.search(r"^0::/(.*)$", _read("/proc/self/cgroup"), re.MULTILINE)
    return found[1] if found else ""


def _memory_limit() -> str:
    texts = [*_cgroup("memory.max"), _read(_CGROUPS / "memory/memory.limit_in_bytes").strip()]
    # Version 1 writes "no limit" as the largest number of pages.
    limits = [int(t) for t in texts if t.isdigit() and int(t) < 1 << 60]
    return size(min(limits)) if limits else "none"


def _cpu_limit() -> str:
    shares = [int(q) / int(p) for q, p in (t.split() for t in _cgroup("cpu.max") if " " in t) if q != "max"]
    quota = _read(_CGROUPS / "cpu/cpu.cfs_quota_us").strip()
    if quota.isdigit():
        shares.append(int(quota) / int(_read(_CGROUPS / "cpu/cpu.cfs_period_us")))
    return f"{min(shares):g} CPUs" if shares else "none"
