"""How many threads a step runs on: as many as there are cores that this process may really use.

A container's quota, and the processors that the process is bound to, count; two hardware threads of one core share what
a matrix product needs, and count once. ``OMP_NUM_THREADS`` is the user's word. Binding is left to the user too: a
process started with ``numactl`` or ``taskset`` keeps its threads, and so the memory that they touch first, there.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from engine_sdk.memory import control_groups

log = logging.getLogger(__name__)


@functools.cache
def choose() -> None:
    """Set torch's number of threads, once a process; warn where the user's is more than can run at once.

    Ranks of one engine share the machine: ``LOCAL_WORLD_SIZE``, which it sets, says how many.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    usable = max(1, usable_cores(available_processors()) // ranks)
    most = min(len(available_processors()), math.ceil(min(quota(), 1 << 20)))
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(min(usable, torch.get_num_threads()))
    elif torch.get_num_threads() > max(1, most // ranks):
        log.warning(
            "OMP_NUM_THREADS asks for %d threads in each of %d processes, and %d can run at once: each step waits for "
            "the slowest, several times longer; set OMP_NUM_THREADS=%d",
            *(torch.get_num_threads(), ranks, usable * ranks, usable),
        )


def available_processors() -> set[int]:
    """The processors that this process is bound to."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def usable_cores(processors: set[int], root: Path = Path("/")) -> int:
    """Cores behind `processors` that the quota of the control groups leaves; at least 1.

    Args:
        processors: their numbers.
        root: where ``proc`` and ``sys`` are.
    """
    cores = {_siblings(processor, root) for processor in processors}
    return math.ceil(min(len(cores), quota(root)))


def _siblings(processor: int, root: Path) -> str:
    """What all hardware threads of a core have in common."""
    topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
    try:
        return (topology / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(processor)


def quota(root: Path = Path("/")) -> float:
    """Processors' worth of time that the process's control groups allow; infinite without a limit."""
    return min(_quotas(root), default=math.inf)


def _quotas(root: Path) -> Iterator[float]:
    """Of the process's group and of those around it, in versions 1 and 2."""
    for group, second in control_groups("cpu", root):
        names = ("cpu.max",) if second else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        try:
            words = [word for name in names for word in (group / name).read_text().split()]
        except OSError:
            continue
        if words[0] not in ("max", "-1"):
            yield int(words[0]) / int(words[1])
