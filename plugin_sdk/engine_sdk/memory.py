"""Memory of an accelerator through `torch.accelerator`, and of the host through the kernel's own figures."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from engine.interfaces import Device, MemoryInfo, MemoryManager

_CACHES: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
"""Memory of the host that caches hold, written or not."""


class TorchMemory(MemoryManager):
    """Memory of a device that torch drives."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._host = device.torch_device.type == "cpu"

    def kv_budget(self, fraction: float) -> int:
        """What remains of `fraction` of the device after what this process holds.

        Never more than `fraction` of what is free, so that other processes on the device keep what they have.
        """
        self.release()
        info, held = self._device.memory_info(), self._held()
        promised = sum(map(len, _CACHES)) if self._host else 0
        return max(0, int(min(fraction * info.total - held - promised, fraction * (info.free - promised))))

    def _held(self) -> int:
        if self._host:
            return _process_memory("RssAnon")
        return torch.accelerator.memory_allocated(self._device.torch_device)

    def allocate(self, nbytes: int) -> Tensor:
        """See `MemoryManager.allocate`.

        A host gives its memory page by page as it is first written, so that a large cache costs nothing until it is
        used; what is promised in this way counts as taken in `kv_budget`.
        """
        if not self._host:
            return torch.zeros(nbytes, dtype=torch.uint8, device=self._device.torch_device)
        pages = fresh_pages(max(1, nbytes))
        _CACHES.add(pages)
        return torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """See `MemoryManager.peak`.

        On an accelerator: of the caching allocator. On a host: of the process's resident memory, so that memory which
        was freed before, and is used again, does not count.
        """
        found: list[int] = []
        if self._host:
            reset = _reset_resident_peak()
            # Where the peak cannot be reset, an earlier and higher one would hide this one: measure from there.
            before = _process_memory("VmRSS" if reset else "VmHWM")
            yield found
            found.append(max(0, _process_memory("VmHWM") - before))
            return
        device = self._device.torch_device
        self._device.synchronize()
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        yield found
        self._device.synchronize()
        found.append(torch.accelerator.max_memory_allocated(device) - before)

    def release(self) -> None:
        """See `MemoryManager.release`."""
        gc.collect()
        if not self._host:
            torch.accelerator.empty_cache()
            return
        with suppress(OSError, AttributeError):  # only glibc has it; others need no such call
            ctypes.CDLL(None).malloc_trim(0)


def fresh_pages(nbytes: int) -> mmap.mmap:
    """Memory of the host, zero, that takes none until it is written; raises `OSError` without addresses for it.

    It has large pages where the system does, which are fewer entries of the address cache.
    """
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def host_memory(root: Path = Path("/")) -> MemoryInfo:
    """Free and total bytes of the host's memory for this process, under every control group that it is in.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    meminfo = _fields(root / "proc/meminfo")
    total = meminfo.get("MemTotal", 0) * 1024
    free = meminfo.get("MemAvailable", 0) * 1024
    if not total:  # no Linux: all there is, without a figure for what is free
        total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, used in _group_limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return MemoryInfo(free, total)


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, bool]]:
    """Folders of the process's control group and of the groups around it, and whether they are of version 2.

    Args:
        controller: ``"memory"``, ``"cpu"``.
        root: where ``proc`` and ``sys`` are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        # In a container the path may be the host's, and only the mount's own folder is there.
        for group in ((folder := mount / path.lstrip("/")), *folder.parents):
            if not group.is_relative_to(mount):
                break
            yield group, not controllers


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of the process's memory control group and of the groups around it, in versions 1 and 2."""
    for group, second in control_groups("memory", root):
        if second:
            maximum, current, cache = "memory.max", "memory.current", "inactive_file"
        else:
            maximum, current, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        limit, used = _number(group / maximum), _number(group / current)
        if limit is not None and used is not None:
            yield limit, used - _fields(group / "memory.stat").get(cache, 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _fields(path: Path) -> dict[str, int]:
    """Lines ``name: 12 kB`` or ``name 12`` as numbers."""
    try:
        words = (line.replace(":", " ").split() for line in path.read_text().splitlines())
        return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}
    except OSError:
        return {}


def _process_memory(field: str) -> int:
    return _fields(Path("/proc/self/status")).get(field, 0) * 1024


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
